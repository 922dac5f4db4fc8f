"""Runs a script of this plugin as it is, when tracing is on.

With tracing on, xapi runs `python3 -m observer <script> --json` with PYTHONPATH at the script's directory
(xen-api ocaml/xapi-storage-script/main.ml). Its own observer runs the script inside Python, which an executable
is not made for. This module lies beside the script, so it is found first. The plugin writes the spans itself, by
TRACEPARENT and OBSERVER_CONFIG_DIR.
"""

import os
import sys

os.execv(sys.argv[1], sys.argv[1:])

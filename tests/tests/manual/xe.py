#!/usr/bin/env python3
"""A stand-in for xe: takes the commands below in the form in which xapi's own takes them (ocaml/xapi-cli-server/
cli_frontend.ml) and nothing else, and turns those about SRs and disks into calls of the plugins. What xapi itself would do
with a VM is not done: a migration is only checked, its disks and SRs have to be there.

XE_STATE is a file that keeps what was made, with HOST, VM and OTHER_SR in it from the start.
"""
import json, os, subprocess, sys, uuid

SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
# Name: what it has to have, and what it may have; a colon ends a prefix.
COMMANDS = {
    "sr-create": (["name-label", "type"], ["name-description", "host-uuid", "device-config:", "shared", "physical-size",
                                           "content-type", "sm-config:"]),
    "sr-introduce": (["name-label", "type", "uuid"], ["name-description", "shared", "content-type"]),
    "sr-scan": (["uuid"], []),
    "sr-forget": (["uuid"], []),
    "pbd-create": (["host-uuid", "sr-uuid"], ["device-config:"]),
    "pbd-list": ([], ["params", "sr-uuid", "host-uuid", "uuid", "--minimal"]),
    "pbd-plug": (["uuid"], []),
    "pbd-unplug": (["uuid"], []),
    "vdi-create": (["sr-uuid", "name-label", "virtual-size"], ["sm-config:", "sharable", "tags:", "type"]),
    "vdi-list": ([], ["params", "sr-uuid", "uuid", "name-label"]),
    "vdi-destroy": (["uuid"], []),
    "vm-snapshot": (["new-name-label", "uuid"], ["new-name-description", "ignore-vdi-uuids"]),
    "vm-migrate": (["uuid", "remote-master", "remote-username", "remote-password"],
                   ["live", "host", "host-uuid", "remote-network", "force", "copy", "compress", "vif:", "vdi:", "vgpu:"]),
}


def die(why):
    sys.exit(f"xe: {why}")


def plugin(method, **request):
    done = subprocess.run(["xapi-storage-qcow2-volume", method], input=json.dumps({"dbg": "xe", **request}),
                          capture_output=True, text=True, check=False)
    if done.returncode:
        die(f"{method}: {done.stdout} {done.stderr}")
    return json.loads(done.stdout)


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        die(f"not a command: {sys.argv[1:]}")
    command, (required, optional) = sys.argv[1], COMMANDS[sys.argv[1]]
    given = {}
    for word in sys.argv[2:]:
        # A flag, which is no name of a value.
        word = f"{word}=true" if word == "--minimal" else word
        name, equals, value = word.partition("=")
        if not equals or not value:
            die(f"{word} is not of the form name=value")
        prefix = name[: name.find(":") + 1] if ":" in name else None
        if (prefix or name) not in required + optional or name in given:
            die(f"{command} takes no {name}, or takes it once")
        given[name] = value
    for name in required:
        if name not in given:
            die(f"{command} has to have {name}")
    with open(os.environ["XE_STATE"], encoding="utf-8") as file:
        state = json.load(file)
    srs, pbds = state["srs"], state["pbds"]

    def sr(key="uuid"):
        if given[key] not in srs:
            die(f"there is no SR {given[key]}")
        return srs[given[key]]

    def device_config():
        return {name.partition(":")[2]: value for name, value in given.items() if name.startswith("device-config:")}

    def volume_of(key):
        for one in srs:
            if srs[one]["plugged"] and any(volume["key"] == key for volume in plugin("SR.ls", sr=srs[one]["sr"])):
                return srs[one]["sr"]
        return die(f"there is no VDI {key}")

    if given.get("type", "qcow2") != "qcow2" or given.get("shared", "false") not in ("true", "false"):
        die("the SR's type or shared is wrong")
    if given.get("host-uuid", state["host"]) != state["host"]:
        die("there is no such host")
    if command == "sr-create":
        made = str(uuid.uuid4())
        config = plugin("SR.create", uuid=made, configuration=device_config(), name=given["name-label"], description="")
        srs[made] = {"sr": plugin("SR.attach", configuration={**config, "sr_uuid": made}), "plugged": True}
        pbds[str(uuid.uuid4())] = {"sr": made, "config": config}
        print(made)
    elif command == "sr-introduce":
        if any(entry["plugged"] for entry in [srs.get(given["uuid"], {"plugged": False})]):
            die("the SR is known already")
        srs[given["uuid"]] = {"sr": None, "plugged": False}
        print(given["uuid"])
    elif command == "pbd-create":
        sr("sr-uuid")
        made = str(uuid.uuid4())
        pbds[made] = {"sr": given["sr-uuid"], "config": device_config()}
        print(made)
    elif command == "pbd-list":
        found = [one for one in pbds if pbds[one]["sr"] == given.get("sr-uuid", pbds[one]["sr"])]
        print(",".join(found) if "--minimal" in given else "\n".join(f"uuid ( RO): {one}" for one in found))
    elif command in ("pbd-plug", "pbd-unplug"):
        pbd = pbds.get(given["uuid"]) or die("there is no such PBD")
        entry = srs[pbd["sr"]]
        if command == "pbd-plug":
            entry["sr"] = plugin("SR.attach", configuration={**pbd["config"], "sr_uuid": pbd["sr"]})
        else:
            plugin("SR.detach", sr=entry["sr"])
        entry["plugged"] = command == "pbd-plug"
    elif command == "sr-forget":
        if sr()["plugged"]:
            die("the SR has a PBD that is plugged")
        del srs[given["uuid"]]
        for one in [one for one in pbds if pbds[one]["sr"] == given["uuid"]]:
            del pbds[one]
    elif command == "sr-scan":
        plugin("SR.ls", sr=sr()["sr"])
    elif command == "vdi-create":
        size = given["virtual-size"]
        bytes_ = int(size[:-3]) * SIZES[size[-3:]] if size[-3:] in SIZES else int(size)
        made = plugin("Volume.create", sr=sr("sr-uuid")["sr"], name=given["name-label"], description="", size=bytes_,
                      sharable=False)
        state["disks"].append(made["key"])
        print(made["key"])
    elif command == "vdi-list":
        fields = given.get("params", "uuid,name-label").split(",")
        names = {"uuid": "key", "name-label": "name"}
        for entry in srs.values() if "sr-uuid" not in given else [sr("sr-uuid")]:
            for volume in plugin("SR.ls", sr=entry["sr"]):
                print("\n".join(f"{field} ( RO): {volume[names[field]]}" for field in fields))
    elif command == "vdi-destroy":
        plugin("Volume.destroy", sr=volume_of(given["uuid"]), key=given["uuid"])
    elif given["uuid"] != state["vm"]:
        die("there is no such VM")
    elif command == "vm-snapshot":
        for disk in state["disks"]:
            taken = plugin("Volume.snapshot", sr=volume_of(disk), key=disk)
            plugin("Volume.set_name", sr=volume_of(disk), key=taken["key"], new_name=given["new-name-label"])
        print(uuid.uuid4())
    elif command == "vm-migrate":
        moved = {name[4:]: to for name, to in given.items() if name.startswith("vdi:")}
        if sorted(moved) != sorted(state["disks"]) or not all(to in srs for to in moved.values()):
            die(f"every disk of the VM goes to an SR that is there, not {moved}")
    with open(os.environ["XE_STATE"], "w", encoding="utf-8") as file:
        json.dump(state, file)


main()

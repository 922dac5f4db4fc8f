//! The SMAPIv3 volume plugin `qcow2`: SRs that are directories, volumes that are trees of qcow2 files.
//!
//! One executable answers every method, each from a file of its own; [`METHODS`] is the whole table. What is on
//! disk, and how it is changed, is in [`plugin::store`]. Called with another argument it is the worker that brings space
//! back ([`plugin::gc`]).

mod about;
mod request;
mod sr;
mod usage;
mod vol;

use std::process::ExitCode;

use plugin::gc;
use plugin::host::Host;
use plugin::smapi::{self, Method, typed};

/// What this plugin answers.
const METHODS: &[Method] = &[
    Method { name: "Plugin.Query", call: |host, request| typed(host, request, about::query::execute) },
    Method { name: "Plugin.diagnostics", call: |host, request| typed(host, request, about::diagnostics::execute) },
    Method { name: "Plugin.ls", call: |host, request| typed(host, request, about::ls::execute) },
    Method { name: "SR.attach", call: |host, request| typed(host, request, sr::attach::execute) },
    Method { name: "SR.create", call: |host, request| typed(host, request, sr::create::execute) },
    Method { name: "SR.destroy", call: |host, request| typed(host, request, sr::destroy::execute) },
    Method { name: "SR.detach", call: |host, request| typed(host, request, sr::detach::execute) },
    Method { name: "SR.ls", call: |host, request| typed(host, request, sr::ls::execute) },
    Method { name: "SR.probe", call: |host, request| typed(host, request, sr::probe::execute) },
    Method { name: "SR.set_description", call: |host, request| typed(host, request, sr::set_description::execute) },
    Method { name: "SR.set_name", call: |host, request| typed(host, request, sr::set_name::execute) },
    Method { name: "SR.stat", call: |host, request| typed(host, request, sr::stat::execute) },
    Method { name: "Volume.clone", call: |host, request| typed(host, request, vol::clone::execute) },
    Method { name: "Volume.compose", call: |host, request| typed(host, request, vol::compose::execute) },
    Method { name: "Volume.compare", call: |host, request| typed(host, request, vol::compare::execute) },
    Method { name: "Volume.copy", call: |host, request| typed(host, request, vol::copy::execute) },
    Method { name: "Volume.create", call: |host, request| typed(host, request, vol::create::execute) },
    Method { name: "Volume.data_destroy", call: |host, request| typed(host, request, vol::data_destroy::execute) },
    Method { name: "Volume.destroy", call: |host, request| typed(host, request, vol::destroy::execute) },
    Method { name: "Volume.disable_cbt", call: |host, request| typed(host, request, vol::disable_cbt::execute) },
    Method { name: "Volume.enable_cbt", call: |host, request| typed(host, request, vol::enable_cbt::execute) },
    Method {
        name: "Volume.list_changed_blocks",
        call: |host, request| typed(host, request, vol::list_changed_blocks::execute),
    },
    Method { name: "Volume.resize", call: |host, request| typed(host, request, vol::resize::execute) },
    Method { name: "Volume.revert", call: |host, request| typed(host, request, vol::revert::execute) },
    Method { name: "Volume.set", call: |host, request| typed(host, request, vol::set::execute) },
    Method {
        name: "Volume.set_description",
        call: |host, request| typed(host, request, vol::set_description::execute),
    },
    Method { name: "Volume.set_name", call: |host, request| typed(host, request, vol::set_name::execute) },
    Method {
        name: "Volume.similar_content",
        call: |host, request| typed(host, request, vol::similar_content::execute),
    },
    Method { name: "Volume.snapshot", call: |host, request| typed(host, request, vol::snapshot::execute) },
    Method { name: "Volume.stat", call: |host, request| typed(host, request, vol::stat::execute) },
    Method { name: "Volume.unset", call: |host, request| typed(host, request, vol::unset::execute) },
];

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|entry| entry == gc::ENTRY) {
        return gc::main(&Host::from_environment(), &arguments.next().unwrap_or_default());
    }
    smapi::main(METHODS)
}

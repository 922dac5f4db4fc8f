//! The SMAPIv3 datapath plugin `qsd`: how a guest, or a migration, reaches the data of a volume.
//!
//! One executable answers every method, each from a file of its own; [`METHODS`] is the whole table. What a datapath
//! is, and what happens to it when, is in [`plugin::attachment`] and [`plugin::activation`]. The same executable, called
//! with another argument, is the supervisor of a mirror, the relay of an import, the server of a block device, or the
//! worker that brings space back, and it has what installations and systemd's services need.

mod about;
mod data;
mod detached;
mod device;
mod exchange;
mod import;
mod mirror;
mod path;
mod task;

use std::process::ExitCode;

use plugin::gc;
use plugin::host::{Host, service};
use plugin::smapi::{self, Method, typed};

/// What this plugin answers.
const METHODS: &[Method] = &[
    Method { name: "Plugin.Query", call: |host, request| typed(host, request, about::query::execute) },
    Method { name: "Plugin.diagnostics", call: |host, request| typed(host, request, about::diagnostics::execute) },
    Method { name: "Datapath.open", call: |host, request| typed(host, request, path::open::execute) },
    Method { name: "Datapath.attach", call: |host, request| typed(host, request, path::attach::execute) },
    Method { name: "Datapath.activate", call: |host, request| typed(host, request, path::activate::execute) },
    Method {
        name: "Datapath.activate_readonly",
        call: |host, request| typed(host, request, path::activate_readonly::execute),
    },
    Method {
        name: "Datapath.import_activate",
        call: |host, request| typed(host, request, path::import_activate::execute),
    },
    Method { name: "Datapath.deactivate", call: |host, request| typed(host, request, path::deactivate::execute) },
    Method { name: "Datapath.detach", call: |host, request| typed(host, request, path::detach::execute) },
    Method { name: "Datapath.close", call: |host, request| typed(host, request, path::close::execute) },
    Method { name: "Data.copy", call: |host, request| typed(host, request, data::copy::execute) },
    Method { name: "Data.mirror", call: |host, request| typed(host, request, data::mirror::execute) },
    Method { name: "Data.stat", call: |host, request| typed(host, request, data::stat::execute) },
    Method { name: "Data.cancel", call: |host, request| typed(host, request, data::cancel::execute) },
    Method { name: "Data.destroy", call: |host, request| typed(host, request, data::destroy::execute) },
    Method { name: "Data.ls", call: |host, request| typed(host, request, data::ls::execute) },
    Method { name: "Task.stat", call: |host, request| typed(host, request, task::stat::execute) },
    Method { name: "Task.cancel", call: |host, request| typed(host, request, task::cancel::execute) },
    Method { name: "Task.destroy", call: |host, request| typed(host, request, task::destroy::execute) },
    Method { name: "Task.ls", call: |host, request| typed(host, request, task::ls::execute) },
];

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let entry = arguments.next().unwrap_or_default();
    let run = match entry.to_str() {
        Some(gc::ENTRY) => return gc::main(&Host::from_environment(), &arguments.next().unwrap_or_default()),
        Some(exchange::ENTRY) => return exchange::main(arguments),
        Some(plugin::device::ENTRY) => return device::main(&Host::from_environment(), arguments),
        Some(service::ENTRY) => service::main,
        Some(mirror::ENTRY) => mirror::main,
        Some(import::ENTRY) => import::main,
        _ => return smapi::main(METHODS),
    };
    run(&Host::from_environment(), &arguments.next().unwrap_or_default().to_string_lossy())
}

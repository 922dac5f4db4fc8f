//! Runs many cases, a few at a time, and tells all that fail together.

use std::fmt::Display;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;

use crate::world::World;

/// Cases of one test that run at once; they mostly wait.
const AT_ONCE: usize = 3;
/// Names the one case to run.
pub const ONLY: &str = "FAKE_XAPI_CASE";

/// Runs each case on a world that is kept for the next one as long as all is well, and panics with those that failed.
pub fn sweep<C: Display + Sync>(
    test: &str,
    cases: &[C],
    run: impl AsyncFn(&C, &mut Option<World>) -> Result<()> + Sync,
) {
    let only = std::env::var(ONLY).ok();
    let cases: Vec<&C> =
        cases.iter().filter(|case| only.as_ref().is_none_or(|only| case.to_string() == *only)).collect();
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(cases.len()) {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let mut world = None;
                    while let Some(case) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                        let began = std::time::Instant::now();
                        if let Err(error) = run(case, &mut world).await {
                            let calls = world.take().map(|world| last_calls(&world)).unwrap_or_default();
                            let told = format!("{case}: {error:#}\n{calls}");
                            // At once as well: not every run is waited for to its end.
                            eprintln!("{test} failed: {told}");
                            failed.lock().unwrap().push(told);
                        }
                        if only.is_some() || std::env::var_os("FAKE_XAPI_TIMES").is_some() {
                            eprintln!("{test}: {case}: {:?}", began.elapsed());
                        }
                    }
                    if let Some(world) = world
                        && let Err(error) = world.close().await
                    {
                        failed.lock().unwrap().push(format!("at the end: {error:#}"));
                    }
                });
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "{} of {} cases failed; one alone: {ONLY}='<case>' cargo test -p fake-xapi --test {} {test}\n\n{}",
        failed.len(),
        cases.len(),
        env!("CARGO_CRATE_NAME"),
        failed.join("\n\n")
    );
}

/// The last calls that were made, as far as they help.
fn last_calls(world: &World) -> String {
    let calls = world.stage.log.calls();
    let from = calls.len().saturating_sub(80);
    let tell = |call: &fake_xapi::script::CallRecord| {
        let (host, method, started) = (&call.host, call.method, call.started.as_secs_f64());
        match (&call.fault, &call.answer) {
            (Some(fault), answer) => format!("  {started:.3} {host} {method} {fault}: {answer:?}"),
            (None, Some(Err(error))) => format!("  {started:.3} {host} {method}: {error:?}"),
            (None, None) => format!("  {started:.3} {host} {method} never ended"),
            (None, Some(Ok(_))) => format!("  {started:.3} {host} {method}"),
        }
    };
    let calls = calls[from..].iter().map(tell);
    calls.chain(mirrors(world)).collect::<Vec<_>>().join("\n")
}

/// How the mirrors ended that are still known.
fn mirrors(world: &World) -> Vec<String> {
    let mut told = Vec::new();
    for host in [&world.stage.source, &world.stage.destination] {
        let Ok(entries) = std::fs::read_dir(host.runtime_dir().join("mirrors")) else { continue };
        for entry in entries.flatten() {
            let record = std::fs::read_to_string(entry.path().join("state.json")).unwrap_or_default();
            told.push(format!("  mirror of host {}: {record}", host.name()));
        }
    }
    told
}

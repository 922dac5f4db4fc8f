//! Progress bars on standard error while a migration runs, if that is a terminal.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::scenario::Show;
use crate::sxm::Event;

const STEPS: u64 = 1000;

/// Shows phases and volumes as they travel; nothing at all where standard error is not a terminal.
pub fn bars() -> Show {
    if !std::io::stderr().is_terminal() {
        return Arc::new(|_, _| {});
    }
    let bars = Mutex::new(Bars::new());
    Arc::new(move |event, name| bars.lock().unwrap_or_else(PoisonError::into_inner).show(event, name))
}

struct Bars {
    all: MultiProgress,
    phase: ProgressBar,
    volumes: HashMap<String, ProgressBar>,
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::new();
        let phase = all.add(ProgressBar::new_spinner());
        phase.set_style(style("{spinner} {elapsed_precise} {wide_msg}"));
        phase.enable_steady_tick(Duration::from_millis(100));
        Self { all, phase, volumes: HashMap::new() }
    }

    fn show(&mut self, event: &Event, name: &str) {
        match event {
            Event::Phase(phase) => self.phase.set_message(*phase),
            Event::Started { .. } => self.of(name).set_message("copying"),
            Event::Progress { fraction: Some(fraction), .. } => {
                self.of(name).set_position((fraction.clamp(0.0, 1.0) * STEPS as f64) as u64);
            }
            Event::Progress { fraction: None, .. } => {}
            Event::Complete { .. } => {
                let bar = self.of(name);
                bar.set_position(STEPS);
                bar.set_message("in step");
            }
            Event::Arrived { .. } => self.of(name).finish_with_message("there"),
        }
    }

    fn of(&mut self, name: &str) -> &ProgressBar {
        self.volumes.entry(name.to_owned()).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new(STEPS));
            bar.set_style(style("  {prefix:12} [{bar:40}] {percent:>3} % {msg}"));
            bar.set_prefix(name.to_owned());
            bar
        })
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.phase.finish_and_clear();
        for bar in self.volumes.values() {
            bar.finish_and_clear();
        }
        // What follows is told below; a terminal that cannot be cleared costs only the looks.
        let _ = self.all.clear();
    }
}

/// A template that indicatif does not understand would only cost the looks.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("█▉▊▋▌▍▎▏ ")
}

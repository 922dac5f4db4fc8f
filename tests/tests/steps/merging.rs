//! A merge under a guest that is met by another call, at each of its steps.
//!
//! The guest of `v` runs while the two nodes below what it writes to are made one: the upper one is a snapshot's, the lower
//! one nobody's any more. The worker is stopped behind one of the system calls by which it changes what others see, or killed
//! there. Then the volume or its snapshot is mirrored, copied, compared or activated. That is to succeed: if the call waits
//! for the worker, the worker goes on, and one of them gives way. What arrives is what the disk holds, and in the end all
//! that [`super::judge`] looks at is as it should be.
//!
//! A few cases are tried, the same on each run. FAKE_XAPI_MERGE says how many are, FAKE_XAPI_SEED which; `all` stands for
//! every one, a case for itself.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fake_xapi::disk::Sr;
use fake_xapi::processes::Process;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::operation::{BLOCK, Operation};
use super::site::{GC, Site};
use super::world::{GUEST, MIGRATION, WRITER, World};
use super::{in_parallel, parsed, random, take, try_all, variable};

/// How many cases are tried without FAKE_XAPI_MERGE.
const CASES: usize = 5;

/// The system calls by which a worker locks, commits and writes headers.
const STEPS: &str = "renameat,flock,pwrite64";

/// How long anything here may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a call may take that needs a node of a merge.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Which of the two nodes takes the data.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Up,
    Down,
}

impl Way {
    const ALL: [Self; 2] = [Self::Up, Self::Down];

    /// What comes before the merge. The upper node has two blocks of its own and the lower one another; or the upper one has
    /// one, and the lower one two others.
    fn history(self) -> &'static str {
        match self {
            Self::Up => "Snapshot Prune Activate",
            Self::Down => "Revert Write Snapshot Prune Activate",
        }
    }

    /// The snapshot whose node is the upper one.
    fn snapshot(self) -> &'static str {
        match self {
            Self::Up => "new0",
            Self::Down => "new2",
        }
    }
}

/// What meets the worker.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Met {
    /// The guest's disk is mirrored, as by a migration.
    Mirror,
    /// The snapshot is mirrored, which nobody has open.
    MirrorSnapshot,
    /// All blocks of the guest's disk are copied to another.
    Copy,
    /// Another volume is made of the snapshot.
    VolumeCopy,
    /// What the snapshot has is asked for.
    Compare,
    /// The snapshot is activated to be written to.
    Activate,
}

impl Met {
    const ALL: [Self; 6] =
        [Self::Mirror, Self::MirrorSnapshot, Self::Copy, Self::VolumeCopy, Self::Compare, Self::Activate];
}

/// A system call of the worker: its name, and which of them it is.
type Step = (String, usize);

struct Case {
    way: Way,
    step: Step,
    /// Whether the worker is killed there.
    dies: bool,
    met: Met,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fate = if self.dies { "dies" } else { "goes-on" };
        write!(f, "{:?} {}:{} {fate} {:?}", self.way, self.step.0, self.step.1, self.met)
    }
}

impl Case {
    fn parse(text: &str) -> Result<Self> {
        let [way, step, fate, met] = <[&str; 4]>::try_from(text.split(' ').collect::<Vec<_>>())
            .map_err(|_| anyhow::anyhow!("{text} is no case"))?;
        let (call, nth) = step.split_once(':').context("no step")?;
        let case = Self {
            way: Way::ALL.into_iter().find(|known| format!("{known:?}") == way).context("no way")?,
            step: (call.to_owned(), nth.parse()?),
            dies: fate == "dies",
            met: Met::ALL.into_iter().find(|known| format!("{known:?}") == met).context("no call")?,
        };
        ensure!(case.to_string() == text, "{text} is read as {case}");
        Ok(case)
    }

    fn run(&self, small: &World) -> Result<()> {
        let mut world = begun(small, self.way)?;
        let (snapshot, place) = (self.way.snapshot(), parsed(self.way.history())?.len());
        if self.met == Met::Activate {
            world.path("attach", snapshot, WRITER)?;
        }
        if self.met.sends() {
            for method in ["attach", "activate"] {
                world.path(method, "w", MIGRATION)?;
            }
        }
        let worker = Worker::stopped(&world, &self.step)?;
        world.perform(Operation::Write, place, None).context("the guest writes meanwhile")?;
        if self.dies {
            worker.signal(Signal::KILL)?;
        }
        let (method, request) = self.met.request(&world, snapshot);
        let call = world.site.start(&[], method, &request)?;
        if !self.dies {
            worker.until_wanted(&call)?;
            worker.signal(Signal::CONT)?;
        }
        let began = Instant::now();
        let answer = Site::answer(method, call)?;
        ensure!(began.elapsed() < AT_ONCE, "{method} took {:?}", began.elapsed());
        self.ended(&mut world, &answer, place).with_context(|| format!("after {method} answered {answer}"))?;
        worker.end(self.dies)?;
        for method in ["deactivate", "detach"] {
            world.path(method, "v", GUEST)?;
        }
        world.model.active = false;
        world.perform(Operation::Gc, place, None)?;
        let sr = Sr::read(&world.site.path)?;
        let nodes = sr.tree_of(world.key("v")).context("no tree")?.nodes.len();
        // A snapshot is given an overlay to be written to.
        let expected = if self.met == Met::Activate { 3 } else { 2 };
        ensure!(nodes == expected, "{nodes} nodes are left");
        world.end()
    }

    /// Sees what came of the call, and ends what it began.
    fn ended(&self, world: &mut World, answer: &Value, place: usize) -> Result<()> {
        let snapshot = self.way.snapshot();
        let operation = json!({"dbg": "", "operation": answer});
        if self.met.sends() {
            let until = Instant::now() + PATIENCE;
            loop {
                let status = world.site.call("Data.stat", &operation)?;
                ensure!(status["failed"] == json!(false) && Instant::now() < until, "{status}");
                if status["complete"] == json!(true) {
                    break;
                }
            }
        }
        match self.met {
            Met::Mirror => {
                world.perform(Operation::Write, place + 1, None).context("the guest writes on")?;
                world.path("deactivate", "v", GUEST)?;
                world.arrived("v")
            }
            Met::Copy => world.arrived("v"),
            Met::MirrorSnapshot => world.arrived(snapshot),
            Met::VolumeCopy => {
                let copied = world.model.volumes[snapshot].clone();
                world.model.volumes.insert("copied".to_owned(), copied);
                world.name_new(None)
            }
            Met::Compare => {
                let blocks: Vec<u64> = world.model.volumes[snapshot].blocks.keys().copied().collect();
                let ranges = answer["ranges"].as_array().context("no ranges")?.iter();
                let number = |value: &Value| value.as_u64().context("no number");
                let found = ranges.map(|range| Ok(number(&range[0])?..number(&range[0])? + number(&range[1])?));
                let found: Vec<u64> = found.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
                ensure!(found == blocks && answer["blocksize"] == json!(BLOCK), "{blocks:?} are different");
                Ok(())
            }
            Met::Activate => {
                for method in ["deactivate", "detach"] {
                    world.path(method, snapshot, WRITER)?;
                }
                Ok(())
            }
        }?;
        // What is known of its end goes too.
        if self.met.sends() { world.site.call("Data.destroy", &operation).map(drop) } else { Ok(()) }
    }
}

impl Met {
    /// Tells whether something is sent to `w`.
    fn sends(self) -> bool {
        matches!(self, Self::Mirror | Self::MirrorSnapshot | Self::Copy)
    }

    /// Gives the call.
    fn request(self, world: &World, snapshot: &str) -> (&'static str, Value) {
        let sr = &world.site.sr;
        let remote = format!("nbd+unix:///{}?socket={}", world.key("w"), world.site.socket(world.key("w")).display());
        let data =
            |name: &str, domain: &str| json!({"dbg": "", "uri": world.uri(name), "domain": domain, "remote": remote});
        match self {
            Self::Mirror => ("Data.mirror", data("v", GUEST)),
            Self::MirrorSnapshot => ("Data.mirror", data(snapshot, MIGRATION)),
            Self::Copy => {
                let mut request = data("v", GUEST);
                let blocks = world.model.volumes["v"].size / BLOCK;
                request["blocklist"] = json!({"blocksize": BLOCK, "ranges": [[0, blocks]]});
                ("Data.copy", request)
            }
            Self::VolumeCopy => {
                ("Volume.copy", json!({"dbg": "", "sr": sr, "key": world.key(snapshot), "dest_sr": sr}))
            }
            Self::Compare => {
                ("Volume.compare", json!({"dbg": "", "sr": sr, "key": world.key(snapshot), "key2": world.key("w")}))
            }
            Self::Activate => ("Datapath.activate", json!({"dbg": "", "uri": world.uri(snapshot), "domain": WRITER})),
        }
    }
}

impl World {
    /// Takes note that `w` holds what another volume does, and closes it.
    fn arrived(&mut self, of: &str) -> Result<()> {
        let sent = self.model.volumes[of].clone();
        self.model.volumes.insert("w".to_owned(), sent);
        for method in ["deactivate", "detach"] {
            self.path(method, "w", MIGRATION)?;
        }
        Ok(())
    }
}

/// Makes an SR in which there is something to merge under a guest.
fn begun(small: &World, way: Way) -> Result<World> {
    let world = World::after(small, 0, &parsed(way.history())?)?;
    let sr = Sr::read(&world.site.path)?;
    let nodes = sr.tree_of(world.key("v")).context("no tree")?.nodes.len();
    ensure!(nodes == 3, "{nodes} nodes instead of three");
    Ok(world)
}

/// Gives the words by which a worker's steps are traced into a file.
fn tracer(world: &World, log: &Path) -> Result<Vec<String>> {
    let (tree, run) = (world.tree_directory("v")?, world.site.runtime());
    let state = run.join("volumes").join(world.key("v")).join("state.json");
    let start = run.join(format!("mirrors/{}.lock", world.key("v")));
    let mut files = vec![tree.join("tree.json"), tree.join("lock"), tree.join("merge"), state, start];
    let entries = fs::read_dir(&tree)?.collect::<Result<Vec<_>, _>>()?;
    files.extend(
        entries.into_iter().map(|entry| entry.path()).filter(|path| path.extension() == Some("qcow2".as_ref())),
    );
    let mut words: Vec<String> = ["strace", "-qq", "-o"].map(str::to_owned).to_vec();
    words.push(log.display().to_string());
    words.extend(["-e".to_owned(), format!("trace={STEPS}")]);
    for file in files {
        words.extend(["-P".to_owned(), file.display().to_string()]);
    }
    Ok(words)
}

/// Finds the steps of a worker.
fn steps(small: &World, way: Way) -> Result<Vec<Step>> {
    let world = begun(small, way)?;
    let log = world.site.runtime().join("steps");
    let words = tracer(&world, &log)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let output = world.site.start(&words, GC, &json!({}))?.wait_with_output()?;
    ensure!(output.status.success(), "{output:?}");
    let traced = fs::read_to_string(&log)?;
    let mut steps: Vec<Step> = Vec::new();
    for line in traced.lines() {
        let Some((call, _)) = line.split_once('(').filter(|(call, _)| STEPS.split(',').any(|known| known == *call))
        else {
            continue;
        };
        let nth = steps.iter().filter(|(known, _)| known == call).count() + 1;
        steps.push((call.to_owned(), nth));
    }
    let sr = Sr::read(&world.site.path)?;
    let nodes = sr.tree_of(world.key("v")).context("no tree")?.nodes.len();
    ensure!(nodes == 2, "nothing was merged, {traced}");
    world.end()?;
    Ok(steps)
}

/// A worker that stands still.
struct Worker {
    tracer: Option<Child>,
    pid: Pid,
}

impl Worker {
    /// Starts one, and waits until it stands still behind a step.
    fn stopped(world: &World, (call, nth): &Step) -> Result<Self> {
        let log = world.site.runtime().join("steps");
        let mut words = tracer(world, &log)?;
        words.extend(["-e".to_owned(), format!("inject={call}:signal=STOP:when={nth}")]);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut tracer = world.site.start(&words, GC, &json!({}))?;
        let until = Instant::now() + PATIENCE;
        loop {
            // strace says so once it leaves it alone.
            let is_stopped = fs::read_to_string(&log).is_ok_and(|log| log.contains("stopped by SIGSTOP"));
            if let Some(pid) = worker(tracer.id()).filter(|_| is_stopped) {
                return Ok(Self { tracer: Some(tracer), pid });
            }
            if let Some(status) = tracer.try_wait()? {
                bail!("the worker was through before, {status}");
            }
            if Instant::now() > until {
                tracer.kill()?;
                bail!("the worker does not come to it");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid, signal)?)
    }

    /// Waits until a call has ended, or waits for a lock.
    fn until_wanted(&self, call: &Child) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let pid = call.id().to_string();
        loop {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let is_over = stat.is_empty() || stat.contains(") Z");
            let locks = fs::read_to_string("/proc/locks")?;
            let waits = |line: &str| line.contains("-> ") && line.split_whitespace().any(|word| word == pid);
            if is_over || locks.lines().any(waits) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "the call neither ends nor waits for a lock");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for its end, and sees that it has nothing to complain of, unless it was killed.
    fn end(mut self, was_killed: bool) -> Result<()> {
        let output = self.tracer.take().context("no tracer")?.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() != was_killed, "{output:?}");
        ensure!(!said.contains("ERROR") && !said.contains("WARN"), "{said}");
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(mut tracer) = self.tracer.take() {
            let _ = self.signal(Signal::KILL);
            let _ = tracer.wait();
        }
    }
}

/// Finds the worker that is traced by a process. Other cases have workers for SRs of the same uuid.
fn worker(tracer: u32) -> Option<Pid> {
    let is_worker = |process: &Process| {
        process.words().nth(1) == Some(GC.as_bytes()) && process.parent() == Some(tracer.cast_signed())
    };
    Pid::from_raw(Process::all().find(is_worker)?.pid)
}

impl World {
    /// Gives the directory of a volume's tree.
    fn tree_directory(&self, name: &str) -> Result<PathBuf> {
        Ok(fs::canonicalize(self.site.path.join("volumes").join(self.key(name)))?)
    }
}

fn all(small: &World) -> Vec<Case> {
    let found = in_parallel(&Way::ALL, |way| steps(small, *way).unwrap_or_else(|error| panic!("{way:?}: {error:#}")));
    let mut cases = Vec::new();
    for (way, steps) in Way::ALL.into_iter().zip(found) {
        for step in steps {
            for dies in [false, true] {
                cases.extend(Met::ALL.map(|met| Case { way, step: step.clone(), dies, met }));
            }
        }
    }
    cases
}

#[test]
fn whoever_meets_a_merge_under_a_guest_gets_what_the_disk_holds() {
    let small = World::small(Site::new(None).unwrap()).unwrap();
    let cases = match variable("FAKE_XAPI_MERGE").as_deref() {
        Some("all") => all(&small),
        Some(case) if case.parse::<usize>().is_err() => vec![Case::parse(case).unwrap()],
        count => take(&mut random(), all(&small), count.map_or(CASES, |count| count.parse().unwrap())),
    };
    let again = "one alone: FAKE_XAPI_MERGE='<case>' cargo test -p fake-xapi --test steps meets";
    try_all(&cases, again, |case| format!("FAKE_XAPI_MERGE='{case}'"), |case| case.run(&small));
}

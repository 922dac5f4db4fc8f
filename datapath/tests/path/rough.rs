//! Callers that come at once, are killed, or live in a strange place.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::scene::{Scene, answer, executable, start};

#[test]
fn calls_made_at_once_are_right_each_time() {
    let scene = Scene::new();
    for _ in 0..3 {
        for method in ["Datapath.attach", "Datapath.activate"] {
            let calls: Vec<_> = (0..6).map(|_| scene.start(method, "7")).collect();
            let answers: Vec<_> = calls.into_iter().map(|call| answer(call).unwrap()).collect();
            assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
            assert_eq!(scene.processes().len(), 1);
        }
        assert!(scene.io("write -P 1 0 64k"));
        for method in ["Datapath.deactivate", "Datapath.detach"] {
            let calls: Vec<_> = (0..6).map(|_| scene.start(method, "7")).collect();
            for call in calls {
                answer(call).unwrap();
            }
        }
        scene.assert_nothing_left();
    }
}

#[test]
fn domains_that_come_and_go_at_once_leave_nothing() {
    let scene = Scene::new();
    std::thread::scope(|scope| {
        for domain in ["1", "2", "3", "4"] {
            let scene = &scene;
            scope.spawn(move || {
                for _ in 0..3 {
                    for method in ["attach", "activate", "deactivate", "detach"] {
                        scene.call(&format!("Datapath.{method}"), domain);
                    }
                }
            });
        }
    });
    scene.assert_nothing_left();
}

#[test]
fn a_call_that_is_killed_anywhere_can_be_repeated() {
    let scene = Scene::new();
    for step in 0..24 {
        for method in ["attach", "activate", "deactivate", "activate_readonly", "activate", "detach"] {
            let method = format!("Datapath.{method}");
            let mut killed = scene.start(&method, "7");
            // What is swept is where the call is cut; nothing is waited for.
            std::thread::sleep(Duration::from_micros(step * 900));
            killed.kill().unwrap();
            killed.wait().unwrap();
            scene.call(&method, "7");
            assert!(scene.processes().len() <= 1);
            match method.as_str() {
                "Datapath.activate" => assert!(scene.io("write -P 1 0 64k"), "step {step}"),
                "Datapath.activate_readonly" => assert!(scene.io("read -P 1 0 64k"), "step {step}"),
                _ => {}
            }
        }
        scene.assert_nothing_left();
    }
}

#[test]
fn a_caller_without_stdin_with_few_descriptors_and_a_strange_umask_is_served() {
    let scene = Scene::new();
    let run = |setup: &str, method: &str| {
        let script = format!("{setup}; exec \"$0\" {method} --json");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]).arg(executable()).env(plugin::host::ROOT_VARIABLE, scene.host.root());
        answer(start(command.env("LC_ALL", "tr_TR.UTF-8"), scene.request("7").to_string().as_bytes()))
    };
    for method in ["attach", "activate", "deactivate", "activate_readonly", "detach"] {
        run("umask 0; ulimit -n 64; exec 7<&0 <&7", &format!("Datapath.{method}")).unwrap();
        assert!(run("exec <&-", &format!("Datapath.{method}")).is_err());
    }
    scene.assert_nothing_left();
    run("umask 777", "Datapath.activate").unwrap();
    assert!(scene.io("write -P 1 0 64k"));
    scene.call("Datapath.detach", "7");
    scene.assert_nothing_left();
}

#[test]
fn no_process_keeps_a_pipe_or_a_control_terminal_of_the_caller() {
    let scene = Scene::new();
    let mut command = super::scene::command(&scene.host, "Datapath.activate");
    // A pipe that is leaked on purpose, as xapi-storage-script leaks its own.
    let mut holder = Command::new("/bin/cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let leaked = holder.stdin.take().unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    answer(start(&mut command, scene.request("7").to_string().as_bytes())).unwrap();
    drop(leaked);
    // It ends when nobody holds its input any more.
    assert!(holder.wait().unwrap().success());
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", scene.processes()[0])).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    assert_eq!(fields[4], "0", "the control terminal");
}

/// A file system in memory over a host's /run, which is full; it is unmounted when dropped.
struct Full<'a>(&'a Scene);

impl<'a> Full<'a> {
    /// `None` without the right to mount.
    fn over(scene: &'a Scene) -> Option<Self> {
        let run = scene.host.root().join("run");
        let kept = scene.host.root().join("kept");
        let succeeds = |program: &str, arguments: &[&std::ffi::OsStr]| {
            Command::new(program).args(arguments).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
        };
        assert!(succeeds("cp", &["-a".as_ref(), run.as_ref(), kept.as_ref()]));
        let options: [&std::ffi::OsStr; 5] =
            ["-t".as_ref(), "tmpfs".as_ref(), "-osize=256k,mode=700".as_ref(), "tmpfs".as_ref(), run.as_ref()];
        let mounted = succeeds("mount", &options).then(|| Self(scene))?;
        assert!(succeeds("cp", &["-a".as_ref(), kept.join(".").as_ref(), run.as_ref()]));
        Some(mounted)
    }

    fn filler(&self) -> std::path::PathBuf {
        self.0.host.root().join("run/filler")
    }

    /// Takes all the space that there is.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.filler()).unwrap();
        while std::io::Write::write_all(&mut file, &[0; 512]).is_ok() {}
    }

    /// Gives it back.
    fn free(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for Full<'_> {
    fn drop(&mut self) {
        let run = self.0.host.root().join("run");
        let _ = Command::new("umount").arg("-l").arg(run).status();
    }
}

#[test]
fn a_full_run_directory_makes_clear_errors_and_nothing_worse() {
    let scene = Scene::new();
    let Some(full) = Full::over(&scene) else {
        return eprintln!("skipped: no right to mount");
    };
    full.fill();
    let failure = scene.try_call("Datapath.attach", "7").unwrap_err();
    assert_eq!(failure.code, "SR_BACKEND_FAILURE_44", "{failure:?}");
    assert!(scene.processes().is_empty());
    full.free();
    scene.call("Datapath.attach", "7");
    full.fill();
    // Told what it is to do it says that it cannot, or does it.
    if let Err(failure) = scene.try_call("Datapath.activate", "7") {
        assert_eq!(failure.code, "SR_BACKEND_FAILURE_44", "{failure:?}");
        full.free();
        scene.call("Datapath.activate", "7");
        full.fill();
    }
    assert!(scene.io("write -f -P 1 0 64k"));
    for method in ["Datapath.deactivate", "Datapath.detach"] {
        if let Err(failure) = scene.try_call(method, "7") {
            assert_eq!(failure.code, "SR_BACKEND_FAILURE_44", "{method}: {failure:?}");
            full.free();
            scene.call(method, "7");
            full.fill();
        }
    }
    scene.assert_nothing_left();
    full.free();
    scene.call("Datapath.attach", "7");
    scene.call("Datapath.activate", "7");
    assert!(scene.io("read -P 1 0 64k"));
    scene.call("Datapath.detach", "7");
    scene.assert_nothing_left();
}

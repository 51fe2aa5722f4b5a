//! Commands against a real etcd, with this test in the place of the daemons: it writes what they would write.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use etcd_client::{Client, GetOptions};
use pgherd::cli::demo::cluster::{LocalCluster, Said};
use pgherd::cli::demo::ports::PortBlock;
use pgherd::cli::demo::process::wait_for;
use pgherd::cli::demo::programs::Programs;
use pgherd::cli::demo::runtime::block_on;
use pgherd::etcd::{Etcd, Settings};
use pgherd::facts::cluster::DecisionRecord;
use pgherd::facts::requests::{RequestKey, RequestProgress, StageTime};
use serde_json::{Value, json};

/// No test waits longer than this for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// One etcd, and nobody else.
struct Bed {
    cluster: LocalCluster,
    _ports: PortBlock,
    _place: tempfile::TempDir,
}

impl Bed {
    fn up() -> Bed {
        let place = tempfile::Builder::new().prefix("pgherd-").tempdir().unwrap();
        std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let ports = PortBlock::free().unwrap();
        let programs = Programs::find(Path::new(env!("CARGO_BIN_EXE_pgherd"))).unwrap();
        let plan = LocalCluster::plan_on_loopback(&place.path().join("c"), 2, 1, &ports, programs);
        let cluster = LocalCluster::lay_out(plan).unwrap();
        cluster.start_etcd().unwrap();
        Bed { cluster, _ports: ports, _place: place }
    }

    /// Runs a command, and checks its exit code.
    #[track_caller]
    fn pgherd(&self, arguments: &[&str], code: i32) -> Said {
        let said = self.cluster.pgherd(arguments).unwrap();
        assert_eq!(said.code, Some(code), "{arguments:?}: {}{}", said.out, said.err);
        said
    }

    #[track_caller]
    fn apply(&self, document: &str, more: &[&str], code: i32) -> Said {
        let file = self.cluster.plan.dir.join("applied.yaml");
        std::fs::write(&file, document).unwrap();
        self.pgherd(&[&["apply", "-f", file.to_str().unwrap()], more].concat(), code)
    }

    fn document(&self) -> String {
        self.cluster.document().unwrap().to_yaml()
    }

    fn url(&self) -> String {
        self.cluster.plan.etcd[0].client_url()
    }

    fn etcd(&self) -> Etcd {
        Etcd::new(Settings::plain(vec![self.url()], "/pgherd", self.cluster.plan.cluster.parse().unwrap())).unwrap()
    }

    fn put(&self, key: &str, value: &str) {
        block_on(async {
            let mut client = Client::connect([self.url()], None).await?;
            client.put(format!("/pgherd/{}/{key}", self.cluster.plan.cluster), value, None).await?;
            Ok(())
        })
        .unwrap();
    }

    /// Everything that is in etcd, with the revisions of its keys.
    fn everything(&self) -> Vec<(String, i64)> {
        block_on(async {
            let mut client = Client::connect([self.url()], None).await?;
            let all = client.get("/", Some(GetOptions::new().with_prefix())).await?;
            Ok(all.kvs().iter().map(|kv| (kv.key_str().unwrap().to_owned(), kv.mod_revision())).collect())
        })
        .unwrap()
    }

    /// Two members, of which the first leads.
    fn put_members(&self) {
        for (name, role, state) in [("n1", "primary", "running"), ("n2", "replica", "streaming")] {
            let record = json!({
                "incarnation": { "boot_id": "b", "started_ns": 1 }, "role": role, "state": state, "machine_state": "primary",
                "timeline": 1, "receive_lsn": "0/3000000", "replay_lsn": "0/3000000", "system_id": "7", "data_directory": "full",
                "vote": null, "api_url": "http://127.0.0.1:1", "host": "127.0.0.1", "port": 5432,
                "versions": { "pgherd": "0.1.0", "postgres": 170_010, "guard_protocol": 1 }, "observed_generation": 1,
            });
            self.put(&format!("members/{name}"), &record.to_string());
        }
        self.put("leader", "n1");
        self.put("initialize", "7");
    }

    /// The requests that are open.
    fn requests(&self) -> BTreeMap<String, RequestKey> {
        block_on(async { Ok(self.etcd().read_view().await?.requests) }).unwrap()
    }

    /// Waits for a request, and says how far it got.
    fn answer(&self, progress: &[RequestProgress]) {
        for step in progress {
            let mut found = BTreeMap::new();
            assert!(wait_for(PATIENCE, || {
                found = self.requests();
                !found.is_empty()
            }));
            let (id, request) = found.pop_first().unwrap();
            assert!(block_on(async { Ok(self.etcd().update_request(&id, request.mod_revision, step.clone()).await?) }).unwrap());
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let ended = self.cluster.end();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

#[test]
fn a_document_is_applied_by_compare_and_swap_and_kept_as_typed() {
    let bed = Bed::up();
    let document = bed.document();
    assert!(bed.pgherd(&["status"], 0).out.contains("no spec is applied"));
    bed.pgherd(&["status", "--check"], 1);
    bed.pgherd(&["get"], 1);

    bed.apply(&document, &["--dry-run"], 0);
    assert_eq!(bed.everything(), [], "a dry run writes nothing");
    bed.apply(&document, &["--generation", "3"], 4);
    assert!(bed.apply(&document, &[], 0).out.contains("generation 1 is in force"));
    assert_eq!(bed.pgherd(&["get"], 0).out, document);

    let before = bed.everything();
    assert!(bed.apply(&document, &[], 0).out.contains("in force already, as generation 1"));
    assert_eq!(bed.everything(), before, "applying the same again writes nothing");

    let changed = format!("# by hand\n{document}");
    bed.apply(&changed, &["--generation", "0"], 4);
    bed.apply(&changed, &["--generation", "1"], 0);
    assert_eq!(bed.pgherd(&["get"], 0).out, changed);
    assert_eq!(bed.pgherd(&["get", "--generation", "1"], 0).out, document);
    bed.apply(&document.replace("name: demo", "name: other"), &["--cluster", "demo"], 4);
}

#[test]
fn status_and_check_say_whether_the_cluster_is_ready() {
    let bed = Bed::up();
    bed.apply(&bed.document(), &[], 0);
    let absent: Value = serde_json::from_str(&bed.pgherd(&["status", "-o", "json"], 0).out).unwrap();
    assert_eq!(absent["members"][1]["state"], "unknown");
    assert_eq!(absent["generation"], 1);
    bed.pgherd(&["status", "--check"], 1);
    bed.put_members();
    let ready: Value = serde_json::from_str(&bed.pgherd(&["status", "-o", "json", "--check"], 0).out).unwrap();
    assert_eq!(ready["leader"], "n1");
    assert_eq!(ready["members"][1]["receive_lag_bytes"], 0);
    let table = bed.pgherd(&["status"], 0).out;
    assert!(table.contains("| n2     | 127.0.0.1:5432 | Replica | streaming |"), "{table}");
    bed.put("leader", "../who");
    bed.pgherd(&["status", "--check"], 1);
}

#[test]
fn a_document_that_drops_the_leader_is_refused() {
    let bed = Bed::up();
    bed.apply(&bed.document(), &[], 0);
    bed.put_members();
    bed.put("leader", "n3");
    let said = bed.apply(&format!("# changed\n{}", bed.document()), &[], 4);
    assert!(said.err.contains("switch over to another member first"), "{}", said.err);
}

#[test]
fn requests_in_vain_are_refused_and_not_written() {
    let bed = Bed::up();
    let said = bed.pgherd(&["switchover", "--to", "n2", "--yes"], 4);
    assert!(said.err.contains("nobody leads"), "{}", said.err);
    bed.pgherd(&["bootstrap", "--on", "n1", "--yes"], 4);
    bed.put_members();
    bed.pgherd(&["switchover", "--to", "n1", "--yes"], 4);
    bed.pgherd(&["switchover", "--to", "n3", "--yes"], 4);
    let said = bed.pgherd(&["switchover", "--to", "n2"], 2);
    assert!(said.err.contains("--yes"), "nobody can answer a question here: {}", said.err);
    assert!(bed.requests().is_empty());
}

#[test]
fn a_request_is_followed_to_its_end_and_cleared_away() {
    let bed = Bed::up();
    bed.put_members();
    let stages = vec![StageTime { stage: "checkpoint".to_owned(), ms: 40 }];
    let claimed = RequestProgress::Claimed { by: "n1".parse().unwrap(), stage: "stop".to_owned(), stages: stages.clone() };
    let done = RequestProgress::Done { message: "n2 leads on timeline 2".to_owned(), stages };
    let refused = RequestProgress::Refused { reason: "n2 is 3 GB behind".to_owned() };
    for (end, code) in [(done, 0), (refused, 4)] {
        std::thread::scope(|scope| {
            let command = scope.spawn(|| bed.pgherd(&["switchover", "--to", "n2", "--yes", "--timeout", "60"], code));
            bed.answer(std::slice::from_ref(&claimed));
            assert!(wait_for(PATIENCE, || bed.requests().values().any(|request| request.record.progress == claimed)));
            bed.answer(&[end]);
            let said = command.join().unwrap();
            let told = format!("{}{}", said.out, said.err);
            assert!(code != 0 || told.contains("(checkpoint 0.04 s)"), "each stage is told with its duration: {told}");
            assert!(told.contains("n2 leads on timeline 2") || told.contains("n2 is 3 GB behind"), "{told}");
        });
        assert!(bed.requests().is_empty());
    }
}

#[test]
fn a_request_that_nobody_takes_up_is_taken_back_and_is_6() {
    let bed = Bed::up();
    bed.put_members();
    let said = bed.pgherd(&["switchover", "--to", "n2", "--yes", "--timeout", "2"], 6);
    assert!(said.err.contains("taken back"), "{}", said.err);
    assert!(bed.requests().is_empty());
}

/// Found by reading: it was deleted, and said to be taken back, while a leader carried it out.
#[test]
fn a_request_that_is_taken_up_in_the_last_moment_is_not_said_to_be_taken_back() {
    let bed = Bed::up();
    bed.put_members();
    let mut command = std::process::Command::new(&bed.cluster.plan.programs.pgherd);
    command.args(["switchover", "--to", "n2", "--yes", "--timeout", "3"]).stderr(std::process::Stdio::piped());
    command.env("PGHERD_ENDPOINTS", bed.url()).env("PGHERD_CLUSTER", &bed.cluster.plan.cluster);
    let child = command.spawn().unwrap();
    let begun = std::time::Instant::now();
    assert!(wait_for(PATIENCE, || !bed.requests().is_empty()));
    let signal = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
    // It does not see that it is taken up before its time is over.
    signal(nix::sys::signal::Signal::SIGSTOP);
    bed.answer(&[RequestProgress::Claimed { by: "n1".parse().unwrap(), stage: "stop".to_owned(), stages: Vec::new() }]);
    assert!(wait_for(PATIENCE, || begun.elapsed() > Duration::from_secs(4)));
    signal(nix::sys::signal::Signal::SIGCONT);
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(6), "{said}");
    assert!(said.contains("still running (n1: stop") && !said.contains("taken back"), "{said}");
    assert_eq!(bed.requests().len(), 1, "whoever carries it out answers it");
}

#[test]
fn events_are_listed_oldest_first_and_as_json() {
    let bed = Bed::up();
    for count in ["first", "second"] {
        let event = DecisionRecord {
            at: "2026-11-22T12:00:00.000Z".to_owned(),
            member: "n1".parse().unwrap(),
            kind: count.to_owned(),
            message: "a sentence".to_owned(),
            facts: BTreeMap::new(),
        };
        block_on(async { Ok(bed.etcd().append_event(&event).await?) }).unwrap();
    }
    let lines = bed.pgherd(&["events"], 0).out;
    assert!(lines.find("first") < lines.find("second"), "{lines}");
    let json: Value = serde_json::from_str(&bed.pgherd(&["events", "-n", "1", "-o", "json"], 0).out).unwrap();
    assert_eq!(json[0]["kind"], "second");
}

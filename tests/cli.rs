//! The command as scripts use it: the built binary, its exit codes, what goes to which stream.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const CLUSTER: &str = "\
apiVersion: pgherd/v1
kind: Cluster
metadata: { name: main }
spec:
  members:
    - { name: mdw, address: 10.0.12.9 }
    - { name: standby, address: 10.0.12.4 }
";

/// A port that nothing listens on: discard, below what is handed out to anyone.
const NOBODY: &str = "http://127.0.0.1:9";

fn pgherd(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgherd"));
    command.args(arguments).stdin(Stdio::null());
    for name in ["PGHERD_ENDPOINTS", "PGHERD_PREFIX", "PGHERD_CLUSTER"] {
        command.env_remove(name);
    }
    command
}

fn run(arguments: &[&str]) -> Output {
    pgherd(arguments).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("ended by a signal: {output:?}"))
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path.to_string_lossy().into_owned()
}

/// Whom PostgreSQL would run as: never root.
fn os_user() -> nix::unistd::User {
    let me = nix::unistd::Uid::effective();
    let user = if me.is_root() { nix::unistd::User::from_name("postgres") } else { nix::unistd::User::from_uid(me) };
    user.unwrap().expect("the user that PostgreSQL runs as")
}

/// A node document whose secrets are in `folder`; `more` goes below `spec`.
fn node(folder: &Path, more: &str) -> String {
    let superuser = write(folder, "superuser", "canary-superuser\n");
    let replication = write(folder, "replication", "canary-replication\n");
    for file in [&superuser, &replication] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    let user = os_user();
    for file in [&superuser, &replication] {
        nix::unistd::chown(Path::new(file), Some(user.uid), None).unwrap();
    }
    let user = user.name;
    let data = folder.join("data");
    let text = format!(
        "apiVersion: pgherd/v1\nkind: Node\nmetadata: {{ name: mdw }}\nspec:\n  cluster: main\n  etcd: {{ endpoints: [ \"{NOBODY}\" ] }}\n  \
         postgres:\n    os_user: {user}\n    data_dir: {}\n    superuser: {{ username: postgres, password_file: {superuser} }}\n    \
         replication: {{ username: replicator, password_file: {replication} }}\n  run_dir: {}\n{more}",
        data.display(),
        folder.join("run").display(),
    );
    write(folder, "node.yaml", &text)
}

#[test]
fn wrong_use_is_2_and_help_is_0() {
    for wrong in
        [&["conquer"][..], &[], &["apply"], &["status", "--output", "xml"], &["switchover", "--to", "A B", "--yes"], &["schema", "table"]]
    {
        let output = run(wrong);
        assert_eq!(code(&output), 2, "{wrong:?}: {}", err(&output));
        assert_eq!(out(&output), "", "{wrong:?}");
    }
    for right in [&["--help"][..], &["--version"], &["version"], &["status", "--help"]] {
        assert_eq!(code(&run(right)), 0, "{right:?}");
    }
    assert!(out(&run(&["version"])).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn an_etcd_that_cannot_be_reached_is_3() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "cluster.yaml", CLUSTER);
    let commands: [&[&str]; 5] =
        [&["status"], &["get"], &["events"], &["switchover", "--to", "standby", "--yes"], &["bootstrap", "--on", "mdw", "--yes"]];
    for command in commands {
        let output = run(&[command, &["--endpoints", NOBODY, "--cluster", "main"]].concat());
        assert_eq!(code(&output), 3, "{command:?}: {}", err(&output));
        assert!(err(&output).contains("no etcd endpoint answered"), "{command:?}: {}", err(&output));
    }
    let output = run(&["apply", "-f", &file, "--endpoints", NOBODY]);
    assert_eq!(code(&output), 3, "the document names its cluster: {}", err(&output));
}

#[test]
fn the_environment_and_a_node_document_say_where_etcd_is() {
    let output = pgherd(&["status"]).env("PGHERD_ENDPOINTS", NOBODY).env("PGHERD_CLUSTER", "main").output().unwrap();
    assert_eq!(code(&output), 3, "{}", err(&output));
    let folder = tempfile::tempdir().unwrap();
    let output = run(&["--config", &node(folder.path(), ""), "status"]);
    assert_eq!(code(&output), 3, "{}", err(&output));
    let output = pgherd(&["status"]).env("PGHERD_ENDPOINTS", NOBODY).env("PGHERD_CLUSTER", "../main").output().unwrap();
    assert_eq!(code(&output), 2, "{}", err(&output));
}

#[test]
fn apply_says_every_problem_of_a_document_with_its_place_and_ends_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let bad = CLUSTER.replace("kind: Cluster", "kind: Cluster\nextra: 1").replace("10.0.12.4 }", "10.0.12.4, prot: 5433 }");
    let file = write(folder.path(), "cluster.yaml", &bad);
    for command in ["apply", "validate"] {
        let output = run(&[command, "-f", &file]);
        assert_eq!(code(&output), 2, "{command}");
        let told = err(&output);
        assert!(told.contains("cluster.yaml:3:") && told.contains("extra"), "{command}: {told}");
        assert!(told.contains("cluster.yaml:8:") && told.contains("`port`"), "{command}: {told}");
    }
    for hostile in ["", "\u{0}", "- a\n- b\n", "metadata: *anchor\n", &"a: ".repeat(100_000)] {
        let file = write(folder.path(), "hostile.yaml", hostile);
        assert_eq!(code(&run(&["validate", "-f", &file])), 2, "{:?}", &hostile[..hostile.len().min(20)]);
    }
    assert_eq!(code(&run(&["apply", "-f", "/no/such/file"])), 2);
}

#[test]
fn what_promises_safety_and_is_not_built_is_refused_with_4_before_etcd_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "cluster.yaml", &format!("{CLUSTER}  watchdog: {{ mode: required }}\n"));
    let output = run(&["apply", "-f", &file, "--endpoints", NOBODY]);
    assert_eq!(code(&output), 4, "{}", err(&output));
    assert!(err(&output).contains("spec.watchdog.mode"), "{}", err(&output));
    let output = run(&["validate", "-f", &file]);
    assert_eq!(code(&output), 0, "valid, with a warning: {}", err(&output));
    assert!(err(&output).contains("pgherd apply will refuse"), "{}", err(&output));
}

#[test]
fn a_document_can_come_from_standard_input() {
    let mut child = pgherd(&["validate", "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(CLUSTER.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), out(&output).as_str()), (0, "standard input: valid cluster document\n"));
}

#[test]
fn secret_files_are_looked_at_by_validate_and_insisted_on_by_run() {
    let folder = tempfile::tempdir().unwrap();
    let file = node(folder.path(), "");
    fs::set_permissions(folder.path().join("superuser"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::remove_file(folder.path().join("replication")).unwrap();
    for (command, expected) in [(&["validate", "-f", &file][..], 0), (&["run", "--config", &file], 2)] {
        let output = run(command);
        let told = err(&output);
        assert_eq!(code(&output), expected, "{command:?}: {told}");
        assert!(told.contains("spec.postgres.superuser.password_file") && told.contains("0644"), "{command:?}: {told}");
        assert!(told.contains("spec.postgres.replication.password_file"), "{command:?}: {told}");
        assert!(!told.contains("canary"), "i14: {told}");
    }
}

#[test]
fn tls_that_was_asked_for_is_never_served_as_plain_http() {
    let folder = tempfile::tempdir().unwrap();
    let key = write(folder.path(), "key.pem", "canary-key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    nix::unistd::chown(Path::new(&key), Some(os_user().uid), None).unwrap();
    let file = node(folder.path(), &format!("  api: {{ tls: {{ cert_file: {key}, key_file: {key} }} }}\n"));
    let output = run(&["run", "--config", &file]);
    assert_eq!(code(&output), 4, "{}", err(&output));
    assert!(err(&output).contains("spec.api.tls"), "{}", err(&output));
}

#[test]
fn the_daemon_gives_up_root_before_it_makes_anything_of_its_own() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // As systemd makes it; and a daemon that cannot write its passfile ends before it starts a guard.
    fs::create_dir_all(folder.path().join("run/pgpass/full")).unwrap();
    let output = run(&["run", "--config", &node(folder.path(), "")]);
    assert_eq!(code(&output), 1, "{}", err(&output));
    assert!(err(&output).contains("pgpass"), "{}", err(&output));
    let owner = |path: &str| fs::metadata(folder.path().join(path)).unwrap_or_else(|e| panic!("{path}: {e}")).uid();
    assert_eq!(owner("run/daemon.lock"), os_user().uid.as_raw());
    if nix::unistd::Uid::effective().is_root() {
        for made in ["run", "data", "data.pgherd"] {
            assert_eq!(owner(made), os_user().uid.as_raw(), "{made} could not be made by the daemon itself");
        }
    }
}

#[test]
fn nothing_is_asked_where_nobody_can_answer() {
    let output = run(&["run", "--config", "/no/such/node.yaml"]);
    assert_eq!(code(&output), 2, "{}", err(&output));
    let output = run(&["run", "--endpoints", NOBODY]);
    assert_eq!(code(&output), 2, "the daemon has a node document: {}", err(&output));
}

#[test]
fn the_committed_schemas_are_those_of_this_version() {
    for kind in ["cluster", "node"] {
        let output = run(&["schema", kind]);
        assert_eq!(code(&output), 0);
        let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(printed["$schema"], "https://json-schema.org/draft/2020-12/schema");
        let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("schemas/{kind}.schema.json"));
        let committed = fs::read_to_string(&committed).unwrap_or_else(|e| panic!("{}: {e}", committed.display()));
        assert!(committed == out(&output), "schemas/{kind}.schema.json is stale: run `make schemas`");
    }
}

//! The rules of this tree that no compiler checks. A rule that is not in here is only a wish.
//!
//! A file may be excused by name and with a reason, never by a comment inside it.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Most lines of a Rust file.
const FILE_MAX_LINES: usize = 500;

/// Longer files, each with the most lines it may have and why it is one file.
const LONGER_FILES: &[(&str, usize, &str)] =
    &[("tests/kernel/world.rs", 540, "one model of lock, lease, guard and watchdog, which has to be read as a whole")];

/// Modules that decide. They get facts and the time as arguments, so that a test and the simulator can hand them any world.
const PURE: &[&str] =
    &["src/spec/", "src/machine/", "src/policy/", "src/facts/", "src/types.rs", "src/guard/ladder.rs", "src/guard/state.rs"];

/// What a pure module must not name: the world outside, any clock, and maps whose order differs from run to run.
const OUTSIDE_WORLD: &[&str] = &[
    "tokio",
    "etcd_client",
    "tokio_postgres",
    "std::fs",
    "std::net",
    "std::process",
    "std::thread",
    "Instant::now",
    "SystemTime::now",
    "BootTime::now",
    "HashMap",
    "HashSet",
];

/// The one file with unsafe code: the guard's few system calls.
const UNSAFE_ALLOWED: &[&str] = &["src/guard/sys.rs"];

/// The places where a test may sleep: helpers that look again and again until a deadline.
const SLEEP_ALLOWED: &[&str] = &["tests/rig/wait.rs", "src/postgres/files.rs"];

/// Rows of SAFETY's matrix of faults that have their right outcome: each is named in a test, `row_N_…`, that checks it.
const ROWS: [u16; 50] = [
    1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 14, 16, 17, 18, 19, 23, 27, 32, 33, 34, 36, 37, 40, 44, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56,
    57, 58, 59, 60, 62, 64, 66, 67, 68, 69, 70, 71, 72, 76, 77,
];

/// Lines with their numbers.
type Lines<'a> = Vec<(usize, &'a str)>;

struct File {
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether the whole file is test code.
    fn is_test(&self) -> bool {
        self.path.starts_with("tests/") || self.path.ends_with("/tests.rs") || self.path.contains("/tests/")
    }

    /// Numbered lines without comments, split at the unit tests: what runs, and what tests it.
    fn code(&self) -> (Lines<'_>, Lines<'_>) {
        let all = || self.text.lines().enumerate().map(|(at, line)| (at + 1, line.split("//").next().unwrap_or("")));
        if self.is_test() {
            return (Vec::new(), all().collect());
        }
        let lines: Vec<&str> = self.text.lines().collect();
        let begins_tests = |pair: &[&str]| pair[0] == "#[cfg(test)]" && pair[1].contains("mod ") && pair[1].contains('{');
        let tests_at = lines.windows(2).position(begins_tests).unwrap_or(usize::MAX - 1) + 1;
        all().partition(|(at, _)| *at <= tests_at)
    }
}

fn tree() -> Vec<File> {
    fn walk(folder: &Path, root: &Path, found: &mut Vec<File>) {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_symlink() || ["target", ".git"].contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                walk(&path, root, found);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                found.push(File { path: path.strip_prefix(root).unwrap().to_string_lossy().into_owned(), text });
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    walk(root, root, &mut found);
    assert!(found.iter().any(|file| file.path == "src/lib.rs"), "the tree was not found at {}", root.display());
    found
}

/// Rust files but this one, which has to name what it forbids.
fn rust_files() -> Vec<File> {
    tree().into_iter().filter(|file| file.is_rust() && file.path != "tests/tidy.rs").collect()
}

#[track_caller]
fn none(rule: &str, offences: &[String]) {
    let mut list = String::new();
    for offence in offences {
        let _ = writeln!(list, "  {offence}");
    }
    assert!(offences.is_empty(), "{rule}:\n{list}");
}

/// Where `word` stands as a word of its own, not as a part of another.
fn names(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

#[test]
fn a_pure_module_names_neither_the_outside_world_nor_a_clock() {
    let mut offences = Vec::new();
    for file in rust_files().iter().filter(|file| PURE.iter().any(|pure| file.path.starts_with(pure))) {
        for (at, line) in file.code().0 {
            for word in OUTSIDE_WORLD.iter().filter(|word| names(line, word)) {
                offences.push(format!("{}:{at} names {word}", file.path));
            }
        }
    }
    none("pure modules get facts and the time as arguments (docs: DESIGN, four kinds of module)", &offences);
}

#[test]
fn the_guard_names_nothing_of_the_crate_that_would_make_it_heavy() {
    let light = ["crate::types", "crate::clock", "crate::facts", "crate::policy::deadlines", "crate::guard"];
    let mut offences = Vec::new();
    for file in rust_files().iter().filter(|file| file.path.starts_with("src/guard/")) {
        for (at, line) in file.code().0 {
            let named = line.match_indices("crate::").map(|(start, _)| &line[start..]);
            for name in named.filter(|name| !light.iter().any(|light| name.starts_with(light))) {
                offences.push(format!("{}:{at} names {name}", file.path));
            }
        }
    }
    none("the guard's memory is locked, and locking costs what it weighs", &offences);
}

#[test]
fn every_source_file_says_first_what_it_is_for() {
    let offences: Vec<String> = rust_files().iter().filter(|file| !file.text.starts_with("//! ")).map(|file| file.path.clone()).collect();
    none("a file starts with a //! header", &offences);
}

#[test]
fn no_source_file_swallows_its_neighbours() {
    let mut offences = Vec::new();
    for file in tree().iter().filter(|file| file.is_rust()) {
        let lines = file.text.lines().count();
        let most = LONGER_FILES.iter().find(|(path, ..)| *path == file.path).map_or(FILE_MAX_LINES, |(_, most, _)| *most);
        if lines > most {
            offences.push(format!("{} has {lines} lines, at most {most}", file.path));
        }
    }
    none("a file has one subject", &offences);
}

#[test]
fn no_excuse_outlives_its_file() {
    let files = tree();
    let excused = LONGER_FILES.iter().map(|(path, ..)| path).chain(UNSAFE_ALLOWED).chain(SLEEP_ALLOWED);
    let offences: Vec<String> =
        excused.filter(|path| !files.iter().any(|file| file.path == **path)).map(|path| (*path).to_owned()).collect();
    none("an excused file exists", &offences);
}

#[test]
fn unsafe_code_is_in_the_guards_system_calls_only() {
    let mut offences = Vec::new();
    for file in rust_files().iter().filter(|file| !UNSAFE_ALLOWED.contains(&file.path.as_str())) {
        let (runs, tests) = file.code();
        for (at, line) in runs.iter().chain(&tests).filter(|(_, line)| names(line, "unsafe")) {
            offences.push(format!("{}:{at}: {}", file.path, line.trim()));
        }
    }
    none("no unsafe code", &offences);
}

#[test]
fn nothing_is_left_for_later() {
    let words = ["TODO", "FIXME", "XXX", "HACK", "todo!", "unimplemented!", "dbg!"];
    let mut offences = Vec::new();
    for file in rust_files() {
        for (at, line) in file.text.lines().enumerate() {
            for word in words.iter().filter(|word| names(line, word.trim_end_matches('!')) && line.contains(**word)) {
                offences.push(format!("{}:{} says {word}", file.path, at + 1));
            }
        }
    }
    none("finished or not there", &offences);
}

#[test]
fn no_test_is_skipped() {
    let mut offences = Vec::new();
    for file in rust_files() {
        for (at, line) in file.text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("#[ignore")) {
            offences.push(format!("{}:{}: {}", file.path, at + 1, line.trim()));
        }
    }
    none("a test runs or is deleted", &offences);
}

#[test]
fn no_test_sleeps_instead_of_waiting_for_a_condition() {
    let mut offences = Vec::new();
    for file in rust_files().iter().filter(|file| !SLEEP_ALLOWED.contains(&file.path.as_str())) {
        for (at, line) in file.code().1 {
            if line.contains("thread::sleep") || line.contains("time::sleep") {
                offences.push(format!("{}:{at}: {}", file.path, line.trim()));
            }
        }
    }
    none("poll with a deadline", &offences);
}

#[test]
fn nothing_names_the_machine_it_was_written_on() {
    // Pieces, so that this file does not name them either.
    let places = [["/wo", "rk/"].concat(), ["/fa", "rm/"].concat(), ["/root", "/."].concat(), ["/opt/", "pgt"].concat()];
    let mut offences = Vec::new();
    for file in tree() {
        for (at, line) in file.text.lines().enumerate() {
            for place in places.iter().filter(|place| line.contains(place.as_str())) {
                offences.push(format!("{}:{} names {place}", file.path, at + 1));
            }
        }
    }
    none("no path of one machine", &offences);
}

#[test]
fn neither_a_test_nor_the_demo_can_reach_the_machines_watchdog() {
    let device = ["/dev/", "watchdog"].concat();
    let mut offences = Vec::new();
    for file in rust_files().iter().filter(|file| file.path.starts_with("tests/") || file.path.starts_with("src/cli/demo/")) {
        for (at, line) in file.text.lines().enumerate().filter(|(_, line)| line.contains(&device)) {
            offences.push(format!("{}:{}: {}", file.path, at + 1, line.trim()));
        }
    }
    none("opening the device and dying would reset the machine", &offences);
}

/// Functions of a file that are tests: of their own, or against each kind of server.
fn tests_of(file: &File) -> Vec<&str> {
    let name_of = |line: &'_ str| line.find("fn ").map(|at| at + 3);
    let (mut found, mut is_test, mut against_both) = (Vec::new(), false, false);
    for line in file.text.lines().map(str::trim) {
        if line.starts_with("#[") {
            is_test |= ["#[test]", "#[tokio::test"].iter().any(|test| line.starts_with(test));
        } else if line.starts_with("against_both! {") {
            against_both = true;
        } else if against_both {
            against_both = line != "}";
            found.extend(line.split(',').map(str::trim).filter(|name| !name.is_empty() && *name != "}"));
        } else {
            let name = name_of(line).filter(|_| is_test).and_then(|at| line[at..].split(['(', '<']).next());
            found.extend(name);
            is_test = false;
        }
    }
    found
}

/// Rows of the matrix that no name of a test has.
fn unnamed_rows(files: &[File]) -> Vec<String> {
    let names: Vec<&str> = files.iter().filter(|file| file.is_rust()).flat_map(tests_of).collect();
    let named = |row: &u16| {
        let word = format!("row_{row}_");
        names.iter().any(|name| name.starts_with(&word) || name.contains(&format!("_{word}")))
    };
    ROWS.iter().filter(|row| !named(row)).map(|row| format!("row {row}")).collect()
}

#[test]
fn every_row_of_the_matrix_of_faults_that_is_promised_is_named_in_a_test() {
    none("a fault's right outcome is checked by a test that names its row", &unnamed_rows(&rust_files()));
}

/// Licences that a dependency may be used under.
const LICENCES: &[&str] = &[
    "MIT",
    "MIT-0",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "BSL-1.0",
    "Unlicense",
];

/// Whether an SPDX expression leaves a choice that may be used. Older manifests write OR as a slash.
fn may_be_used(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ");
    let choice = |text: &str| text.trim().trim_matches(['(', ')']).split(" OR ").any(|licence| LICENCES.contains(&licence.trim()));
    let all_of = |text: &str| text.split(" AND ").all(choice);
    // AND binds tighter than OR, unless the OR stands in brackets.
    if expression.contains('(') { all_of(&expression) } else { expression.split(" OR ").any(all_of) }
}

#[test]
fn every_dependency_has_a_licence_that_may_be_used() {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let offence = |package: &serde_json::Value| {
        let licence = package["license"].as_str().unwrap_or("none told");
        (!may_be_used(licence)).then(|| format!("{} is under {licence}", package["name"]))
    };
    none("a dependency's licence", &metadata["packages"].as_array().unwrap().iter().filter_map(offence).collect::<Vec<_>>());
}

#[test]
fn nothing_that_is_shipped_is_built_with_deliberate_bugs() {
    let text = |path: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let manifest = text("Cargo.toml");
    assert!(manifest.contains("\nmutants = []"), "the feature stands alone");
    assert!(!manifest.contains("default = ["), "no feature is on by default");
    let mut targets = text("Makefile").split("\n\n").filter(|target| target.contains("--features")).map(str::to_owned).collect::<Vec<_>>();
    targets.retain(|target| !target.starts_with("mutants:"));
    none("only `make mutants` builds with a feature", &targets);
}

#[test]
fn the_rules_can_fail() {
    assert!(names("use tokio::net;", "tokio") && !names("my_tokio", "tokio") && !names("tokio_postgres", "tokio"));
    assert!(may_be_used("GPL-3.0 OR MIT") && may_be_used("(MIT OR GPL-3.0) AND ISC") && may_be_used("MIT/Apache-2.0"));
    assert!(!may_be_used("GPL-3.0") && !may_be_used("MIT AND GPL-3.0") && !may_be_used("none told"));
    let file = File { path: "src/spec/a.rs".into(), text: "//! A.\nuse x; // tokio\n#[cfg(test)]\nmod tests {\nuse tokio;\n}\n".into() };
    let (runs, tests) = file.code();
    assert!(!runs.iter().any(|(_, line)| names(line, "tokio")), "comments and tests are free");
    assert!(tests.iter().any(|(_, line)| names(line, "tokio")));
    let text = "#[test]\nfn row_1_a() {}\nfn row_2_a() {}\n// row_3_a\n#[tokio::test]\nasync fn i1_row_4_a() {}\n#[test]\nfn row_20_a() {}\n\
                against_both! { 1, &[];\nrow_6_a,\n}\nasync fn row_9_a(server: S) {}\n";
    let unnamed = unnamed_rows(&[File { path: "tests/a.rs".into(), text: text.into() }]);
    let is_missing = |row: u16| unnamed.contains(&format!("row {row}"));
    assert!([2, 3, 5, 9].into_iter().all(is_missing), "helpers, comments and other rows name nothing: {unnamed:?}");
    assert!(![1, 4, 6].into_iter().any(is_missing) && unnamed.len() == ROWS.len() - 3, "{unnamed:?}");
}

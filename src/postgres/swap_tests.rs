//! A swap that ends at any step, and what the next run makes of it.

use std::cell::Cell;
use std::collections::BTreeMap;

use anyhow::bail;

use super::*;

thread_local! {
    static EFFECTS_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    static BY_ENTRY: Cell<bool> = const { Cell::new(false) };
}

pub(super) fn crash_if_due() -> Result<()> {
    match EFFECTS_LEFT.get() {
        Some(0) => bail!("crash"),
        left => EFFECTS_LEFT.set(left.map(|left| left - 1)),
    }
    Ok(())
}

pub(super) fn rename_whole_works() -> io::Result<()> {
    if BY_ENTRY.get() { Err(Errno::EACCES.into()) } else { Ok(()) }
}

const OLD: [(&str, &str); 3] = [("PG_VERSION", "old"), ("global/pg_control", "old"), ("pg_wal/1", "diverged")];
const NEW: [(&str, &str); 4] = [("PG_VERSION", "new"), ("global/pg_control", "new"), ("pg_wal/1", "shared"), ("standby.signal", "")];

fn fill(directory: &Path, content: &[(&str, &str)]) {
    for (name, text) in content {
        let path = directory.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

fn holds(directory: &Path, content: &[(&str, &str)]) -> bool {
    fn walk(directory: &Path, root: &Path, found: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            if path.is_dir() { walk(&path, root, found) } else { found.extend([(name, fs::read_to_string(&path).unwrap())]) }
        }
    }
    let mut found = BTreeMap::new();
    walk(directory, directory, &mut found);
    found == content.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

struct Place {
    _directory: tempfile::TempDir,
    layout: Layout,
}

fn place(old: bool) -> Place {
    // In memory: hundreds of swaps sync each step.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let layout = Layout::new(&directory.path().join("data"), None).unwrap();
    if old {
        fill(layout.data_dir(), &OLD);
    }
    fill(&layout.clone_dir(), &NEW);
    Place { _directory: directory, layout }
}

fn kept() -> Keep {
    Keep::Whole { why: "diverged".into() }
}

/// Crashes before the n-th effect of a swap and before the m-th of its recovery, for every n and m.
fn crash_everywhere(old: bool, by_entry: bool, keep: &Keep, judge: impl Fn(&Layout)) {
    BY_ENTRY.set(by_entry);
    let (mut crashes, mut untouched, mut finished) = (0, 0, 0);
    for first in 0.. {
        let mut second = 0;
        loop {
            let place = place(old);
            EFFECTS_LEFT.set(Some(first));
            let swapped = swap(&place.layout, &place.layout.clone_dir(), keep);
            EFFECTS_LEFT.set(Some(second));
            let recovered = recover_interrupted_swap(&place.layout);
            EFFECTS_LEFT.set(None);
            recover_interrupted_swap(&place.layout).unwrap();
            assert!(!place.layout.swap_journal().exists());
            if swapped.is_err() && holds(place.layout.data_dir(), if old { &OLD } else { &[] }) {
                assert!(holds(&place.layout.clone_dir(), &NEW), "a swap that was not begun may be tried again");
                untouched += 1;
            } else {
                assert!(holds(place.layout.data_dir(), &NEW));
                judge(&place.layout);
                finished += 1;
            }
            crashes += usize::from(recovered.is_err());
            match (swapped.is_ok(), recovered.is_ok()) {
                (true, _) => {
                    assert!(crashes > 0 && untouched > 0 && finished > 0, "{crashes} {untouched} {finished}");
                    return;
                }
                (false, true) => break,
                (false, false) => second += 1,
            }
        }
    }
}

#[test]
fn a_diverged_directory_is_kept_whole_whatever_the_moment_of_the_crash() {
    for by_entry in [false, true] {
        crash_everywhere(true, by_entry, &kept(), |layout| {
            assert!(holds(&layout.kept_dir().join("data"), &OLD));
            assert!(fs::read_to_string(layout.kept_dir().join("why.json")).unwrap().contains("diverged"));
        });
    }
}

/// Found by reading: what was left of a swap that never began was taken for a diverged directory, and nothing was swapped any more.
#[test]
fn a_swap_that_a_crash_kept_from_beginning_is_begun_again() {
    let mut kept_from_beginning = 0;
    for first in 0.. {
        let place = place(true);
        let again = || swap(&place.layout, &place.layout.clone_dir(), &kept());
        EFFECTS_LEFT.set(Some(first));
        let ended = again();
        EFFECTS_LEFT.set(None);
        if ended.is_ok() {
            break;
        }
        if !recover_interrupted_swap(&place.layout).unwrap() {
            again().unwrap();
            assert!(holds(&place.layout.kept_dir().join("data"), &OLD) && holds(place.layout.data_dir(), &NEW));
            kept_from_beginning += 1;
        }
    }
    assert!(kept_from_beginning > 1, "{kept_from_beginning}");
}

#[test]
fn a_replaceable_directory_is_whole_until_the_new_one_is_in_place() {
    for by_entry in [false, true] {
        crash_everywhere(true, by_entry, &Keep::Nothing, |layout| assert!(holds(&layout.discard_dir().join("data"), &OLD)));
    }
}

#[test]
fn a_crash_while_an_empty_place_is_filled_is_finished_at_the_start() {
    for by_entry in [false, true] {
        crash_everywhere(false, by_entry, &Keep::Empty, |_| {});
    }
}

#[test]
fn a_second_diverged_directory_is_refused_before_anything_moves() {
    let place = place(true);
    fill(&place.layout.kept_dir(), &[("data/PG_VERSION", "older")]);
    assert!(matches!(swap(&place.layout, &place.layout.clone_dir(), &kept()), Err(SwapError::KeptOccupied(_))));
    assert!(holds(place.layout.data_dir(), &OLD) && !place.layout.swap_journal().exists());
}

#[test]
fn nothing_is_initialized_over_a_full_directory() {
    let place = place(true);
    assert!(matches!(swap(&place.layout, &place.layout.clone_dir(), &Keep::Empty), Err(SwapError::NotEmpty(_))));
    assert!(holds(place.layout.data_dir(), &OLD));
}

#[test]
fn a_file_that_appeared_in_the_meantime_is_never_overwritten() {
    let place = place(false);
    BY_ENTRY.set(true);
    EFFECTS_LEFT.set(Some(5));
    assert!(swap(&place.layout, &place.layout.clone_dir(), &Keep::Empty).is_err());
    EFFECTS_LEFT.set(None);
    fill(place.layout.data_dir(), &[("global/mine", "mine"), ("standby.signal", "mine")]);
    assert!(recover_interrupted_swap(&place.layout).is_err());
    assert_eq!(fs::read_to_string(place.layout.data_dir().join("standby.signal")).unwrap(), "mine");
}

#[tokio::test]
async fn what_is_discarded_goes_with_its_own_wal_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let wal_dir = directory.path().canonicalize().unwrap().join("wal");
    fill(&wal_dir, &[("pgherd-1/000000010000000000000001", "old"), ("pgherd-2/000000010000000000000001", "new")]);
    let layout = Layout::new(&directory.path().join("data"), Some(&wal_dir)).unwrap();
    let discarded = layout.discard_dir().join("data");
    fill(&discarded, &OLD[..2]);
    std::os::unix::fs::symlink(wal_dir.join("pgherd-1"), discarded.join("pg_wal")).unwrap();
    remove_discarded(&layout).await.unwrap();
    assert!(!layout.discard_dir().exists() && !wal_dir.join("pgherd-1").exists() && wal_dir.join("pgherd-2").exists());
    assert_eq!(new_wal_directory(&layout).unwrap(), Some(wal_dir.join("pgherd-1")), "the name is free again");
}

/// Crashes before the n-th effect of emptying, for every n: what is left is whole, or is finished by the next look.
#[test]
fn a_directory_that_is_given_up_is_whole_or_out_and_never_half_there() {
    for by_entry in [false, true] {
        BY_ENTRY.set(by_entry);
        let (mut untouched, mut gone) = (0, 0);
        for effects in 0.. {
            let place = place(true);
            fs::remove_dir_all(place.layout.clone_dir()).unwrap();
            place.layout.prepare().unwrap();
            EFFECTS_LEFT.set(Some(effects));
            let emptied = move_out(&place.layout);
            EFFECTS_LEFT.set(None);
            let journal = place.layout.swap_journal().exists();
            if emptied.is_err() && !journal && holds(place.layout.data_dir(), &OLD) {
                untouched += 1;
                continue;
            }
            recover_interrupted_swap(&place.layout).unwrap();
            assert!(!place.layout.swap_journal().exists() && holds(place.layout.data_dir(), &[]));
            assert!(holds(&place.layout.discard_dir().join("data"), &OLD), "aside, to be removed");
            gone += 1;
            if emptied.is_ok() {
                break;
            }
        }
        assert!(untouched > 0 && gone > 2, "{untouched} {gone}");
    }
    BY_ENTRY.set(false);
}

/// What the next copy begins with, after a look has finished the swap.
fn clear_up(layout: &Layout) {
    recover_interrupted_swap(layout).unwrap();
    remove_whole(layout, &layout.clone_dir()).unwrap();
    tablespaces::remove_unfinished(layout).unwrap();
    remove_whole(layout, &layout.discard_dir().join("data")).unwrap();
}

#[test]
fn p5_a_crash_at_any_step_costs_no_data_directory_its_tablespaces_and_leaves_nobodys() {
    for (by_entry, keep) in [(false, kept()), (true, kept()), (false, Keep::Nothing), (true, Keep::Nothing)] {
        BY_ENTRY.set(by_entry);
        for first in 0.. {
            let Place { _directory, layout } = &place(true);
            let root = _directory.path().canonicalize().unwrap();
            let (old, new) = (root.join("ts/pgherd-1"), root.join("ts/pgherd-2"));
            for (directory, tablespace) in [(layout.data_dir(), &old), (&layout.clone_dir(), &new)] {
                fill(tablespace, &[("PG_17_1/5/1", "rows")]);
                fs::create_dir(directory.join("pg_tblspc")).unwrap();
                std::os::unix::fs::symlink(tablespace, directory.join("pg_tblspc/16385")).unwrap();
            }
            fs::write(layout.tablespaces_note(), serde_json::to_string(&[&new]).unwrap()).unwrap();
            EFFECTS_LEFT.set(Some(first));
            let swapped = swap(layout, &layout.clone_dir(), &keep);
            EFFECTS_LEFT.set(None);
            let link = |directory: &Path| fs::read_link(directory.join("pg_tblspc/16385")).unwrap();
            recover_interrupted_swap(layout).unwrap();
            assert_eq!(layout.tablespaces_note().exists(), link(layout.data_dir()) == old, "noted as long as it is not in place");
            clear_up(layout);
            let mut linked = vec![link(layout.data_dir())];
            let put_aside = layout.kept_dir().join("data");
            linked.extend(put_aside.exists().then(|| link(&put_aside)));
            for tablespace in [&old, &new] {
                assert_eq!(tablespace.join("PG_17_1/5/1").exists(), linked.contains(tablespace), "step {first}: {linked:?}");
            }
            if swapped.is_ok() {
                assert!(first > 5 && linked.contains(&new), "{first}");
                break;
            }
        }
    }
}

#[test]
fn p5_of_a_tablespace_that_a_copy_is_in_too_only_what_is_the_kept_ones_is_said_to_be_to_remove() {
    BY_ENTRY.set(false);
    let Place { _directory, layout } = &place(true);
    let ts = _directory.path().canonicalize().unwrap().join("ts");
    fill(&ts, &[("PG_17_1/5/1", "rows"), ("PG_15_1/5/1", "another's"), ("pgherd-1/PG_17_1/5/1", "the copy's")]);
    fs::write(layout.data_dir().join("PG_VERSION"), "17\n").unwrap();
    fs::create_dir(layout.data_dir().join("pg_tblspc")).unwrap();
    std::os::unix::fs::symlink(&ts, layout.data_dir().join("pg_tblspc/16385")).unwrap();
    swap(layout, &layout.clone_dir(), &kept()).unwrap();
    let why: serde_json::Value = serde_json::from_str(&fs::read_to_string(layout.kept_dir().join(WHY)).unwrap()).unwrap();
    assert_eq!(why["tablespaces"], serde_json::json!([ts.join("PG_17_1")]));
}

#[tokio::test]
async fn what_a_cancelled_job_goes_on_removing_is_waited_for_before_the_next_one_makes_anything() {
    let place = place(true);
    let (removing, is_removing) = std::sync::mpsc::channel::<()>();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let cancelled = std::thread::spawn(move || {
        let _one = REMOVING.lock().unwrap();
        removing.send(()).unwrap();
        ended.recv().unwrap();
    });
    is_removing.recv().unwrap();
    let directory = place.layout.clone_dir();
    let mut next = Box::pin(remove(&place.layout, &directory));
    let early = tokio::time::timeout(std::time::Duration::from_millis(100), &mut next).await;
    assert!(early.is_err() && directory.exists(), "the one before is not through");
    end.send(()).unwrap();
    cancelled.join().unwrap();
    next.await.unwrap();
    assert!(!directory.exists());
}

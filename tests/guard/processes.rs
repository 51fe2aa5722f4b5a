//! The process table, as a test sees it.

/// Name and parent.
pub fn stat(pid: i32) -> Option<(String, i32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, rest) = text.split_once('(')?.1.rsplit_once(')')?;
    Some((name.to_owned(), rest.split_ascii_whitespace().nth(1)?.parse().ok()?))
}

/// What this process has started, and what that has started, and so on.
pub fn descendants(pid: i32) -> Vec<(i32, String)> {
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let all: Vec<(i32, String, i32)> = pids.filter_map(|pid| stat(pid).map(|(name, parent)| (pid, name, parent))).collect();
    let mut family = vec![(pid, String::new())];
    let mut at = 0;
    while at < family.len() {
        let of = family[at].0;
        family.extend(all.iter().filter(|(_, _, parent)| *parent == of).map(|(pid, name, _)| (*pid, name.clone())));
        at += 1;
    }
    family
}

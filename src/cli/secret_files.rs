//! Whether the secret files that a node document names are there and private. For `validate` a warning, for `run` an error.
//!
//! Only metadata is looked at: nothing here opens a secret.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::User;

use crate::spec::node::NodeSpec;
use crate::spec::{Loaded, Problem, Severity};

/// Permission bits that a secret must not have: anything for others, anything beyond read and write for its owner.
const FORBIDDEN_MODE: u32 = 0o7177;

/// What is wrong with the files, each at the place of the key that names it.
pub fn problems(node: &Loaded<NodeSpec>, severity: Severity) -> Vec<Problem> {
    let owner = User::from_name(&node.spec.postgres.os_user).ok().flatten().map(|user| user.uid.as_raw());
    let files = node.spec.secret_files();
    files
        .iter()
        .filter_map(|secret| check(&secret.file, owner).map(|wrong| node.problem(severity, &secret.key, wrong.0, wrong.1)))
        .collect()
}

/// What is wrong, and what to do. `owner` is None when the user is not known on this host, as where documents are checked elsewhere.
fn check(file: &Path, owner: Option<u32>) -> Option<(String, Option<String>)> {
    let shown = file.display();
    let meta = match fs::metadata(file) {
        Ok(meta) => meta,
        Err(error) => return Some((format!("{shown} cannot be looked at: {error}"), None)),
    };
    if !meta.is_file() {
        return Some((format!("{shown} is not a file"), None));
    }
    let mode = meta.mode() & 0o7777;
    if mode & FORBIDDEN_MODE != 0 {
        return Some((format!("{shown} has mode {mode:04o}, so that others may read it"), Some(format!("chmod 0600 {shown}"))));
    }
    match owner {
        Some(owner) if meta.uid() != owner => Some((
            format!("{shown} belongs to uid {}, and spec.postgres.os_user is uid {owner}", meta.uid()),
            Some(format!("chown {owner} {shown}")),
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn a_secret_is_a_file_that_only_its_owner_reads() {
        let me = nix::unistd::Uid::effective().as_raw();
        for mode in [0o600, 0o400] {
            assert_eq!(check(file(mode).path(), Some(me)), None, "{mode:o}");
        }
        for mode in [0o640, 0o604, 0o700, 0o4600] {
            assert!(check(file(mode).path(), Some(me)).is_some(), "{mode:o}");
        }
        assert!(check(file(0o600).path(), Some(me + 1)).unwrap().0.contains("belongs to"));
        assert_eq!(check(file(0o600).path(), None), None, "the user is not known here");
    }

    #[test]
    fn a_secret_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let wrong = check(&folder.path().join("superuser"), None).unwrap();
        assert!(wrong.0.contains("superuser cannot be looked at"), "{wrong:?}");
        assert!(check(folder.path(), None).unwrap().0.contains("is not a file"));
    }
}

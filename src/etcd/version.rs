//! Warns of etcd versions whose leases or watches are known to lie (SAFETY 6). Pure.

use crate::facts::cluster::{Condition, Severity};

/// Per minor version, the first patch without the known bugs. A later minor version has none of them; an earlier one all.
const FIRST_GOOD: [(u64, u64, u64); 3] = [(3, 4, 42), (3, 5, 28), (3, 6, 9)];

/// A condition when the version that the server reports has known bugs, or is not a version at all.
pub fn version_condition(version: &str) -> Option<Condition> {
    let warning = |message: String| Some(Condition { kind: "etcd_version".into(), severity: Severity::Warning, message });
    let Some(found) = parse(version) else {
        return warning(format!(
            "etcd reports the version `{version}`, which cannot be judged: 3.4.42, 3.5.28, 3.6.9 or later is known to be good"
        ));
    };
    if is_good(found) {
        return None;
    }
    warning(format!(
        "etcd {version} may revoke a live lease (etcd #15247), renew a revoked one (#20616), answer reads from the past (#20418) or lose \
         watch events: pgherd works around what it can, but upgrade to 3.4.42, 3.5.28, 3.6.9 or later"
    ))
}

fn is_good((major, minor, patch): (u64, u64, u64)) -> bool {
    match FIRST_GOOD.iter().find(|(m, n, _)| (*m, *n) == (major, minor)) {
        Some((_, _, first)) => patch >= *first,
        None => FIRST_GOOD.iter().all(|(m, n, _)| (major, minor) > (*m, *n)),
    }
}

/// A pre-release (`3.6.9-rc.1`) counts as the version before its number.
fn parse(version: &str) -> Option<(u64, u64, u64)> {
    let (number, pre) = version.trim().split_once('-').map_or((version.trim(), false), |(number, _)| (number, true));
    let mut parts = number.split('.').map(str::parse);
    let (major, minor, patch): (u64, u64, u64) = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
    if parts.next().is_some() {
        return None;
    }
    Some((major, minor, if pre { patch.saturating_sub(1) } else { patch }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_with_known_lease_bugs_are_named_with_their_issues() {
        for bad in ["3.4.23", "3.4.41", "3.5.1", "3.5.27", "3.6.0", "3.6.8", "3.3.27", "2.3.8", "3.6.9-rc.1"] {
            let condition = version_condition(bad).unwrap_or_else(|| panic!("{bad}"));
            assert!(condition.message.contains(bad) && condition.message.contains("#20616"), "{bad}");
        }
        for good in ["3.4.42", "3.5.28", "3.6.9", "3.6.15", "3.7.0", "4.0.0", "3.6.10-rc.0"] {
            assert_eq!(version_condition(good), None, "{good}");
        }
    }

    #[test]
    fn a_version_that_makes_no_sense_is_said_to_be_unknown() {
        for odd in ["", "main", "3.6", "3.6.9.1"] {
            assert!(version_condition(odd).is_some(), "{odd}");
        }
    }
}

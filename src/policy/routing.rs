//! What an HAProxy is to be told, from what the members say that they serve and how its servers stand.
//!
//! HAProxy's own checks stay the judge. It is told nothing but a health (`set server … health`), which its next check confirms or
//! undoes: when pgherd falls silent, HAProxy is right again by itself after one check or `fall` of them. An administrative state
//! (`maint`) would be obeyed for ever, and a server without a check would stay as it was told: both are never used, and never touched.
//!
//! The rules:
//! - A member gets writes only on its own word that it serves them, which is the word that `/primary` gives: a proved lock, before A,
//!   out of recovery. Nothing is concluded from etcd.
//! - It is taken out on its own "no", or because another says "yes": only one can hold a proved lock. Silence is neither.
//! - Two that say "yes" were heard at different moments: neither counts.
//! - "Down" is told as often as HAProxy has it otherwise; "up" once for each time that a member's word turns to it. A check that fails
//!   although the member says "yes" knows more than we do (a firewall, a stricter `lag`), and has the last word.

use std::collections::{BTreeMap, BTreeSet};

use crate::facts::routing::{Backend, Server, ServerState, Serves};
use crate::types::MemberName;

/// What the members say.
pub type Words = BTreeMap<MemberName, Serves>;

/// One thing that HAProxy is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// No new sessions.
    Down(Backend, MemberName),
    /// The sessions that it has for writing are ended.
    Cut(MemberName),
    /// New sessions.
    Up(Backend, MemberName),
}

/// What one HAProxy has been told since it could be asked.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// Whether the next "yes" of a member is told.
    owed: BTreeMap<(Backend, MemberName), bool>,
    /// The primary for which all others' sessions were ended.
    cut_for: Option<MemberName>,
}

impl Told {
    /// What is to be told now. In this order: whoever is out goes before whoever comes in, so that no session begins on the former.
    pub fn orders(&mut self, words: &Words, servers: &[Server]) -> Vec<Order> {
        let primary = primary(words);
        let mut orders = Vec::new();
        let mut up = Vec::new();
        for Server { backend, member, state } in servers {
            let owed = self.owed.entry((*backend, member.clone())).or_insert(*backend == Backend::Primary);
            let word = word(words, primary, *backend, member);
            if word == Some(false) {
                *owed = true;
            }
            match (word, state) {
                (_, ServerState::ByHand | ServerState::Unchecked) | (None, _) => {}
                (Some(false), ServerState::Up) => orders.push(Order::Down(*backend, member.clone())),
                (Some(true), ServerState::Down) if *owed => up.push(Order::Up(*backend, member.clone())),
                (Some(false), ServerState::Down) | (Some(true), _) => {}
            }
            if word == Some(true) {
                *owed = false;
            }
        }
        orders.extend(self.cuts(primary, words, servers, &orders).into_iter().map(Order::Cut));
        orders.extend(up);
        orders
    }

    /// Whose sessions are ended: who is taken out, and once for each new primary everybody else. A host that went away without a word
    /// ends none of its sessions itself.
    fn cuts(&mut self, primary: Option<&MemberName>, words: &Words, servers: &[Server], downs: &[Order]) -> BTreeSet<MemberName> {
        let taken_out = |member: &MemberName| downs.contains(&Order::Down(Backend::Primary, member.clone()));
        let changed = primary.is_some() && self.cut_for.as_ref() != primary;
        if changed {
            self.cut_for = primary.cloned();
        }
        let writes = servers.iter().filter(|server| server.backend == Backend::Primary).map(|server| &server.member);
        let is_out = |member: &&MemberName| word(words, primary, Backend::Primary, member) == Some(false);
        writes.filter(is_out).filter(|member| changed || taken_out(member)).cloned().collect()
    }

    /// Members that say that they take writes, were told to HAProxy, and which its checks hold down all the same.
    pub fn contradicted<'a>(&self, words: &Words, servers: &'a [Server]) -> Vec<&'a MemberName> {
        let primary = primary(words);
        let is_held = |server: &&Server| {
            let told = self.owed.get(&(server.backend, server.member.clone())) == Some(&false);
            server.backend == Backend::Primary && server.state == ServerState::Down && told && primary == Some(&server.member)
        };
        servers.iter().filter(is_held).map(|server| &server.member).collect()
    }
}

/// How the servers stand once they were told.
pub fn after(orders: &[Order], servers: &mut [Server]) {
    for server in servers {
        for order in orders {
            match order {
                Order::Down(backend, member) if (server.backend, &server.member) == (*backend, member) => server.state = ServerState::Down,
                Order::Up(backend, member) if (server.backend, &server.member) == (*backend, member) => server.state = ServerState::Up,
                Order::Down(..) | Order::Up(..) | Order::Cut(_) => {}
            }
        }
    }
}

/// The one that says that it takes writes.
pub fn primary(words: &Words) -> Option<&MemberName> {
    let mut yes = words.iter().filter(|(_, serves)| serves.primary == Some(true)).map(|(member, _)| member);
    let first = yes.next();
    first.filter(|_| yes.next().is_none())
}

/// What is known of a member for a backend.
fn word(words: &Words, primary: Option<&MemberName>, backend: Backend, member: &MemberName) -> Option<bool> {
    let own = words.get(member).copied().unwrap_or_default();
    match backend {
        Backend::Standby => own.replica,
        Backend::Primary => match primary {
            Some(primary) => Some(primary == member),
            None => own.primary.filter(|yes| !yes),
        },
    }
}

/// What is wrong with the way HAProxy is set up; None when it can be told all there is. `members` are those of the spec.
pub fn misfit(members: &[&MemberName], servers: &[Server]) -> Option<String> {
    let of_writes = || servers.iter().filter(|server| server.backend == Backend::Primary);
    let name = Backend::Primary.name();
    if of_writes().next().is_none() {
        return Some(format!("it has no backend `{name}` with servers that are named as the members are"));
    }
    let list = |names: Vec<&MemberName>| names.into_iter().map(MemberName::as_str).collect::<Vec<_>>().join(", ");
    let missing = members.iter().copied().filter(|member| !of_writes().any(|server| server.member == **member)).collect::<Vec<_>>();
    if !missing.is_empty() {
        return Some(format!("its backend `{name}` has no server named {}", list(missing)));
    }
    let unchecked = servers.iter().filter(|server| server.state == ServerState::Unchecked).map(|server| &server.member);
    let unchecked = unchecked.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>();
    (!unchecked.is_empty())
        .then(|| format!("it does not check its servers {}, and what it is told of them would stay for ever", list(unchecked)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> MemberName {
        name.parse().unwrap()
    }

    /// `a: primary`, `b: replica`, `c: no` (neither), `d: ?` (unknown).
    fn words(typed: &str) -> Words {
        let word = |typed: &str| {
            let (member, word) = typed.split_once(':').unwrap();
            let serves = match word.trim() {
                "primary" => Serves { primary: Some(true), replica: Some(false) },
                "replica" => Serves { primary: Some(false), replica: Some(true) },
                "no" => Serves { primary: Some(false), replica: Some(false) },
                _ => Serves::default(),
            };
            (name(member.trim()), serves)
        };
        typed.split(',').map(word).collect()
    }

    /// Servers a, b and c: who is up for writes, and who for reads.
    fn servers(writes: &str, reads: &str) -> Vec<Server> {
        let state = |up: &str, member: &str| if up.contains(member) { ServerState::Up } else { ServerState::Down };
        let of = |backend, up: &str| ["a", "b", "c"].map(|member| Server { backend, member: name(member), state: state(up, member) });
        of(Backend::Primary, writes).into_iter().chain(of(Backend::Standby, reads)).collect()
    }

    fn said(orders: &[Order]) -> String {
        let one = |order: &Order| match order {
            Order::Down(backend, member) => format!("{}/{member} down", backend.name()),
            Order::Up(backend, member) => format!("{}/{member} up", backend.name()),
            Order::Cut(member) => format!("cut {member}"),
        };
        orders.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// One that has told HAProxy that `a` is primary.
    fn told_of_a() -> Told {
        let mut told = Told::default();
        told.orders(&words("a: primary, b: replica, c: replica"), &servers("a", "bc"));
        told
    }

    #[test]
    fn a_change_of_the_primary_takes_the_former_out_cuts_its_sessions_and_then_lets_the_new_one_in() {
        let orders = told_of_a().orders(&words("a: no, b: primary, c: replica"), &servers("a", "bc"));
        assert_eq!(said(&orders), "primary/a down, standby/b down, cut a, cut c, primary/b up");
    }

    #[test]
    fn what_haproxy_has_right_already_is_not_told() {
        let mut told = told_of_a();
        assert_eq!(said(&told.orders(&words("a: primary, b: replica, c: replica"), &servers("a", "bc"))), "");
        let mut servers = servers("a", "bc");
        let words = words("a: no, b: primary, c: replica");
        let orders = told.orders(&words, &servers);
        after(&orders, &mut servers);
        assert_eq!(said(&told.orders(&words, &servers)), "");
    }

    #[test]
    fn a_member_that_is_silent_is_left_to_the_checks_until_another_says_that_it_takes_writes() {
        let mut told = told_of_a();
        assert_eq!(said(&told.orders(&words("a: ?, b: replica, c: replica"), &servers("a", "bc"))), "");
        assert_eq!(said(&told.orders(&words("a: ?, b: primary"), &servers("", "c"))), "cut a, cut c, primary/b up");
    }

    #[test]
    fn without_a_member_that_says_so_nobody_gets_writes() {
        for typed in ["a: no, b: replica, c: replica", "a: ?, b: ?, c: ?"] {
            let orders = Told::default().orders(&words(typed), &servers("", "bc"));
            assert!(!said(&orders).contains("up"), "{typed}: {}", said(&orders));
        }
    }

    #[test]
    fn of_two_that_were_heard_to_take_writes_neither_counts() {
        assert_eq!(said(&told_of_a().orders(&words("a: primary, b: primary, c: replica"), &servers("b", "c"))), "");
    }

    #[test]
    fn who_takes_no_writes_is_taken_out_as_often_as_haproxy_has_it_in() {
        let mut told = told_of_a();
        for _ in 0..3 {
            let orders = told.orders(&words("a: primary, b: replica, c: replica"), &servers("ab", "bc"));
            assert_eq!(said(&orders), "primary/b down, cut b");
        }
    }

    #[test]
    fn a_check_that_fails_although_the_member_says_yes_has_the_last_word() {
        let words = words("a: primary, b: replica, c: replica");
        let mut told = Told::default();
        assert_eq!(said(&told.orders(&words, &servers("", "bc"))), "cut b, cut c, primary/a up");
        for _ in 0..3 {
            assert_eq!(said(&told.orders(&words, &servers("", "bc"))), "");
        }
        assert_eq!(told.contradicted(&words, &servers("", "bc")), [&name("a")]);
        assert!(told.contradicted(&words, &servers("a", "bc")).is_empty());
    }

    #[test]
    fn reads_are_let_in_only_after_the_member_was_seen_not_to_serve_them() {
        let mut told = Told::default();
        let serving = words("a: primary, b: replica, c: replica");
        assert_eq!(said(&told.orders(&serving, &servers("a", "b"))), "cut b, cut c", "c may be behind by HAProxy's own measure");
        told.orders(&words("a: primary, b: replica, c: no"), &servers("a", "b"));
        assert_eq!(said(&told.orders(&serving, &servers("a", "b"))), "standby/c up");
    }

    #[test]
    fn what_somebody_set_by_hand_and_what_has_no_check_is_not_touched() {
        for state in [ServerState::ByHand, ServerState::Unchecked] {
            let servers: Vec<Server> = servers("abc", "abc").into_iter().map(|server| Server { state, ..server }).collect();
            let orders = told_of_a().orders(&words("a: primary, b: replica, c: no"), &servers);
            assert_eq!(said(&orders), "", "{state:?}");
        }
    }

    #[test]
    fn an_haproxy_that_cannot_be_told_all_there_is_is_named() {
        let members = [name("a"), name("b"), name("c"), name("d")];
        let members: Vec<&MemberName> = members.iter().collect();
        assert_eq!(misfit(&members[..3], &servers("a", "bc")), None);
        assert!(misfit(&members, &servers("a", "bc")).unwrap().contains("no server named d"));
        assert!(misfit(&members, &[]).unwrap().contains("no backend `primary`"));
        let mut servers = servers("a", "bc");
        servers[1].state = ServerState::Unchecked;
        assert!(misfit(&members[..3], &servers).unwrap().contains("does not check its servers b"));
    }
}

//! Makes pg_hba.conf and pg_ident.conf, and checks the spec's lines. Never reads a file.
//!
//! pgherd's own lines come first, and pg_hba's first match wins: no line of a spec can shut pgherd out. A line of a spec that PostgreSQL
//! would not read is refused before it is applied: one such line makes a running server keep all its old rules, and stops a starting one.

use core::net::IpAddr;

/// Stands for every member's address, in the address column.
pub const MEMBERS: &str = "{members}";
/// The map in pg_ident.conf by which the operating system's user is the superuser.
pub const MAP: &str = "pgherd";

/// Stands in a pg_hba.conf that lets no client in.
pub const CLOSED: &str = "# Nobody else until standbys have what was recovered: then the spec's lines follow.";

/// All that both files are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HbaInputs {
    /// Addresses of the members: IP addresses or host names.
    pub members: Vec<String>,
    /// The user PostgreSQL and the daemon run as.
    pub os_user: String,
    /// PostgreSQL's superuser.
    pub superuser: String,
    /// The replication role.
    pub replication: String,
    /// The rewind role, when it is not the superuser.
    pub rewind: Option<String>,
    /// The spec's lines, in order.
    pub pg_hba: Vec<String>,
    /// The spec's lines, in order.
    pub pg_ident: Vec<String>,
}

/// The whole of pg_hba.conf.
pub fn pg_hba_conf(inputs: &HbaInputs) -> String {
    let mut lines = own_lines(inputs);
    lines.push("# The spec's lines.".to_owned());
    lines.extend(inputs.pg_hba.iter().flat_map(|line| expand(line, &inputs.members)));
    join(&lines)
}

/// The same without the spec's lines: no client gets in.
pub fn pg_hba_closed(inputs: &HbaInputs) -> String {
    let mut lines = own_lines(inputs);
    lines.push(CLOSED.to_owned());
    join(&lines)
}

fn own_lines(inputs: &HbaInputs) -> Vec<String> {
    let superuser = quote(&inputs.superuser);
    let mut lines = vec![
        "# Written by pgherd from the cluster's spec: edits are undone.".to_owned(),
        "# pgherd's own lines come first, so that no other line can shut it out.".to_owned(),
        format!("local all {superuser} peer map={MAP}"),
        format!("local replication {superuser} peer map={MAP}"),
    ];
    for member in &inputs.members {
        let address = address(member);
        lines.push(format!("host replication {} {address} scram-sha-256", quote(&inputs.replication)));
        lines.push(format!("host all {} {address} scram-sha-256", quote(inputs.rewind.as_deref().unwrap_or(&inputs.superuser))));
    }
    lines
}

/// The whole of pg_ident.conf.
pub fn pg_ident_conf(inputs: &HbaInputs) -> String {
    let mut lines = vec![
        "# Written by pgherd from the cluster's spec: edits are undone.".to_owned(),
        format!("{MAP} {} {}", quote(&inputs.os_user), quote(&inputs.superuser)),
        "# The spec's lines.".to_owned(),
    ];
    lines.extend(inputs.pg_ident.iter().cloned());
    join(&lines)
}

fn join(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// One line for each member where `{members}` stands.
fn expand(line: &str, members: &[String]) -> Vec<String> {
    if line.contains(MEMBERS) {
        members.iter().map(|member| line.replace(MEMBERS, &address(member))).collect()
    } else {
        vec![line.to_owned()]
    }
}

/// `10.0.12.9/32`, `fd00::1/128`, or the host name as it is.
fn address(member: &str) -> String {
    match member.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => format!("{address}/32"),
        Ok(IpAddr::V6(address)) => format!("{address}/128"),
        Err(_) => quote(member),
    }
}

/// In double quotes, where a name means just itself: `"all"` is a role of that name. A double quote inside is doubled.
fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// PostgreSQL's authentication methods on this platform, up to version 18.
const METHODS: [&str; 14] =
    ["trust", "reject", "scram-sha-256", "md5", "password", "gss", "ident", "peer", "ldap", "radius", "cert", "pam", "bsd", "oauth"];

/// Checks one line of a spec's `pg_hba`. The error is a sentence for the person who typed it.
pub fn parse_line(line: &str) -> Result<(), String> {
    let fields = tokenize(line)?;
    let Some((kind, rest)) = fields.split_first() else { return Ok(()) };
    let kind = single(kind, "the connection type")?;
    if kind.starts_with("include") || fields.iter().flatten().any(|token| token.starts_with('@')) {
        return Err("files cannot be included: the rules of a cluster are all in its spec".to_owned());
    }
    let local = match kind {
        "local" => true,
        "host" | "hostssl" | "hostnossl" | "hostgssenc" | "hostnogssenc" => false,
        other => return Err(format!("expected local, host, hostssl, hostnossl, hostgssenc or hostnogssenc first, found `{other}`")),
    };
    let [_databases, _users, rest @ ..] = rest else { return Err(format!("expected databases and users after `{kind}`")) };
    let rest = if local { rest } else { skip_address(rest)? };
    let Some((method, options)) = rest.split_first() else {
        return Err("expected an authentication method, such as scram-sha-256".to_owned());
    };
    check_method(kind, single(method, "the method")?)?;
    for option in options {
        let option = single(option, "an option")?;
        if option.split_once('=').is_none_or(|(name, _)| name.is_empty()) {
            return Err(format!("expected options after the method as name=value, found `{option}`"));
        }
    }
    Ok(())
}

/// Checks one line of a spec's `pg_ident`.
pub fn parse_ident_line(line: &str) -> Result<(), String> {
    let fields = tokenize(line)?;
    match fields.len() {
        0 => Ok(()),
        3 if fields[0].first().is_some_and(|name| name == MAP) => Err(format!("the map `{MAP}` is pgherd's own: use another name")),
        3 if fields.iter().flatten().any(|token| token.starts_with('@')) => {
            Err("files cannot be included: the rules of a cluster are all in its spec".to_owned())
        }
        3 => Ok(()),
        found => Err(format!("expected a map name, a system user and a database user, found {found} words")),
    }
}

fn single<'a>(field: &'a [String], what: &str) -> Result<&'a str, String> {
    match field {
        [one] => Ok(one),
        _ => Err(format!("expected one word for {what}, found `{}`", field.join(","))),
    }
}

/// What follows the address, which is one word, or an IP address and a mask.
fn skip_address(fields: &[Vec<String>]) -> Result<&[Vec<String>], String> {
    let Some((address, rest)) = fields.split_first() else { return Err("expected an address after the users".to_owned()) };
    let address = single(address, "the address")?;
    if METHODS.contains(&address) {
        return Err(format!("expected an address after the users, found the method `{address}`"));
    }
    if matches!(address, "all" | "samehost" | "samenet" | MEMBERS) {
        return Ok(rest);
    }
    if let Some((network, bits)) = address.split_once('/') {
        let network: IpAddr = network.parse().map_err(|_| format!("expected an IP address before the `/`, found `{network}`"))?;
        let most = if network.is_ipv4() { 32 } else { 128 };
        return match bits.parse::<u8>() {
            Ok(bits) if bits <= most => Ok(rest),
            _ => Err(format!("expected a mask length of at most {most}, found `{bits}`")),
        };
    }
    let Ok(network) = address.parse::<IpAddr>() else { return host_name(address).map(|()| rest) };
    let Some((mask, rest)) = rest.split_first() else { return Err(format!("expected /{} or a mask after {network}", bits_of(network))) };
    match single(mask, "the mask")?.parse::<IpAddr>() {
        Ok(mask) if mask.is_ipv4() == network.is_ipv4() => Ok(rest),
        _ => Err(format!("expected {network}/{} or a mask in the next column, found `{}`", bits_of(network), mask.join(","))),
    }
}

fn bits_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn host_name(text: &str) -> Result<(), String> {
    // Only digits and dots would be looked up as a name and never match.
    let plausible = text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) && text.chars().any(|c| c.is_ascii_alphabetic());
    if plausible {
        return Ok(());
    }
    Err(format!("expected an address: IP/length, a host name, all, samehost, samenet or {MEMBERS}; found `{text}`"))
}

fn check_method(kind: &str, method: &str) -> Result<(), String> {
    if !METHODS.contains(&method) {
        return Err(format!(
            "`{method}` is no authentication method; expected scram-sha-256, peer, cert, reject or another of PostgreSQL's"
        ));
    }
    match (method, kind) {
        ("peer", kind) if kind != "local" => Err("peer works on local lines only".to_owned()),
        ("gss", "local") => Err("gss does not work on local lines".to_owned()),
        ("cert", kind) if kind != "hostssl" => Err("cert works on hostssl lines only".to_owned()),
        _ => Ok(()),
    }
}

/// Fields, each a list of tokens, as PostgreSQL's next_token reads them: blanks and commas separate, double quotes hold them together,
/// `#` begins a comment. A token that was quoted keeps no mark of it, except that `@` in it is no file.
fn tokenize(line: &str) -> Result<Vec<Vec<String>>, String> {
    if line.contains(['\n', '\r', '\0']) {
        return Err("expected one line".to_owned());
    }
    if line.trim_end().ends_with('\\') {
        return Err("a line cannot be continued with `\\`".to_owned());
    }
    let mut fields: Vec<Vec<String>> = Vec::new();
    let mut rest = line.chars().peekable();
    // Whether the next token goes on with the last field: after a comma.
    let mut joined = false;
    loop {
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        // A comma after a blank joins nothing.
        if rest.next_if(|c| *c == ',').is_some() {
            joined = false;
            continue;
        }
        let Some(token) = next_token(&mut rest)? else { return Ok(fields) };
        match fields.last_mut().filter(|_| joined) {
            Some(field) => field.push(token),
            None => fields.push(vec![token]),
        }
        joined = rest.next_if(|c| *c == ',').is_some();
    }
}

fn next_token(rest: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<Option<String>, String> {
    let (mut token, mut quoted, mut any) = (String::new(), false, false);
    while let Some(&c) = rest.peek() {
        if !quoted && (c.is_whitespace() || c == ',') {
            break;
        }
        if !quoted && c == '#' {
            rest.by_ref().for_each(drop);
            break;
        }
        rest.next();
        any = true;
        match c {
            '"' if quoted && rest.next_if(|next| *next == '"').is_some() => token.push('"'),
            '"' => quoted = !quoted,
            // A quoted @ is a plain character; it is marked so that it is not taken for a file.
            '@' if quoted && token.is_empty() => token.push('\u{1}'),
            other => token.push(other),
        }
    }
    if quoted {
        return Err("a double quote is not closed".to_owned());
    }
    Ok(any.then_some(token))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn inputs() -> HbaInputs {
        HbaInputs {
            members: vec!["10.0.12.9".into(), "fd00::1".into(), "db3.example".into()],
            os_user: "postgres".into(),
            superuser: "postgres".into(),
            replication: "replicator".into(),
            rewind: None,
            pg_hba: vec!["host all all {members} scram-sha-256".into(), "host all all all reject".into()],
            pg_ident: vec!["web /^(.*)@example[.]com$ app".into()],
        }
    }

    #[test]
    fn pgherds_own_lines_come_before_anything_of_the_spec() {
        let text = pg_hba_conf(&inputs());
        let rules: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(rules[0], "local all \"postgres\" peer map=pgherd");
        let own = rules.iter().rposition(|rule| rule.contains("\"replicator\"")).unwrap();
        assert!(own < rules.iter().position(|rule| rule.starts_with("host all all")).unwrap());
        assert_eq!(pg_ident_conf(&inputs()).lines().nth(1), Some("pgherd \"postgres\" \"postgres\""));
    }

    #[test]
    fn members_stand_for_every_address_in_its_own_form() {
        let text = pg_hba_conf(&inputs());
        for address in ["10.0.12.9/32", "fd00::1/128", "\"db3.example\""] {
            assert!(text.contains(&format!("host replication \"replicator\" {address} scram-sha-256\n")), "{text}");
            assert!(text.contains(&format!("host all all {address} scram-sha-256\n")), "{text}");
        }
    }

    #[test]
    fn the_lines_people_write_are_accepted() {
        for line in [
            "",
            "  # a comment",
            "local all all peer",
            "local all all peer map=x",
            "host all all 10.0.0.0/8 scram-sha-256",
            "host all all 10.0.0.0 255.0.0.0 md5 # old",
            "host db1,db2 \"my role\",+admins ::1/128 scram-sha-256",
            "hostssl all all all cert clientcert=verify-full",
            "host replication repl .example.com scram-sha-256",
            "host all all {members} scram-sha-256",
            "host all all samenet ldap ldapserver=l \"ldapprefix=cn=\" ldapsuffix=\", dc=x\"",
            "host \"@db\" all all reject",
            "host \"/^db\\d+$\" all all trust",
        ] {
            assert_eq!(parse_line(line), Ok(()), "{line}");
        }
    }

    #[test]
    fn a_line_postgresql_would_not_read_is_refused_with_a_sentence() {
        for (line, part) in [
            ("hots all all all trust", "hots"),
            ("host all all", "address"),
            ("host all all trust", "address"),
            ("host all all 10.0.0.0/33 trust", "32"),
            ("host all all 10.0.0.0 trust", "mask"),
            ("host all all 10.0.0.300/32 trust", "IP address"),
            ("host all all all", "method"),
            ("host all all all scram", "scram"),
            ("host all all all peer", "local"),
            ("host all all all trust now", "name=value"),
            ("host @dbs all all trust", "included"),
            ("include other.conf", "included"),
            ("host \"all all all trust", "quote"),
            ("host all all all trust\nlocal all all trust", "one line"),
            ("host all all all trust \\", "continued"),
        ] {
            let error = parse_line(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
        assert!(parse_ident_line("pgherd root postgres").unwrap_err().contains("own"));
        assert!(parse_ident_line("a b").is_err());
    }

    proptest! {
        #[test]
        fn a_hostile_role_stays_one_word(name in "[^\0\r\n]{1,30}") {
            let line = format!("local all {} peer", quote(&name));
            prop_assert_eq!(parse_line(&line), Ok(()));
            prop_assert_eq!(tokenize(&line).unwrap()[2].len(), 1);
        }

        #[test]
        fn no_line_makes_the_parser_panic(line in ".{0,60}") {
            let _ = parse_line(&line);
            let _ = parse_ident_line(&line);
        }
    }
}

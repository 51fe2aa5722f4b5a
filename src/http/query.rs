//! Query parameters, read as Patroni reads them: of a name given twice the first counts, and an empty value is as good as none.

/// The query's parameters, decoded, in their order.
pub type Parameters = [(String, String)];

/// The first value of `name` that is not empty.
pub fn first<'a>(parameters: &'a Parameters, name: &str) -> Option<&'a str> {
    parameters.iter().find(|(key, value)| key == name && !value.is_empty()).map(|(_, value)| value.as_str())
}

/// A number of bytes with PostgreSQL's units: `16777216`, `16kB`, `10MB`, `1GB`. None when it cannot be read: Patroni ignores that.
pub fn bytes(text: &str) -> Option<i64> {
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '-' | '+'))).unwrap_or(text.len());
    let number: f64 = text.get(..digits)?.parse().ok()?;
    let unit = match text.get(digits..)?.trim() {
        "" | "B" => 1.0,
        "kB" => 1024.0,
        "MB" => 1024.0 * 1024.0,
        "GB" => 1024.0 * 1024.0 * 1024.0,
        "TB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    // `as` saturates at the ends of i64, which is what "more than any lag" means.
    #[allow(clippy::cast_possible_truncation)]
    Some((number * unit).round() as i64)
}

/// `tag_KEY=VALUE` parameters.
pub fn tags(parameters: &Parameters) -> impl Iterator<Item = (&str, &str)> {
    parameters.iter().filter(|(_, value)| !value.is_empty()).filter_map(|(key, value)| Some((key.strip_prefix("tag_")?, value.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_read_with_postgresqls_units() {
        let cases = [("0", 0), ("16777216", 16_777_216), ("16kB", 16_384), ("10MB", 10_485_760), ("1GB", 1 << 30), ("1.5kB", 1536)];
        for (text, number) in cases {
            assert_eq!(bytes(text), Some(number), "{text}");
        }
    }

    #[test]
    fn a_lag_that_cannot_be_read_is_none() {
        for text in ["", "ten", "10m", "1Mi", "MB", "--1", "1e"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn the_first_value_that_is_not_empty_counts() {
        let parameters: Vec<_> = [("lag", ""), ("lag", "1"), ("lag", "2")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert_eq!(first(&parameters, "lag"), Some("1"));
        assert_eq!(first(&parameters, "tag_x"), None);
    }
}

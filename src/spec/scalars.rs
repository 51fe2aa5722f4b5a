//! Values as PostgreSQL's people type them: durations, sizes, and text that is never re-read as a YAML boolean or number.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer};

/// Why a text is not such a value, and what to type instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Complaint {
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

/// Splits `16kB` into `16` and `kB`; None when there is no number in front or it does not fit.
fn split_unit(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, &text[end..]))
}

/// Units of durations and their milliseconds.
const DURATION_UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("min", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Reads `30`, `500ms`, `30s`, `5min`, `1h`, `1d`; a bare number is seconds.
pub(super) fn parse_duration(text: &str) -> Result<Duration, Complaint> {
    let complaint =
        |hint| Complaint { message: format!("expected a duration such as 30, 500ms, 30s, 5min, 1h or 1d, found `{text}`"), hint };
    let Some((number, unit)) = split_unit(text) else { return Err(complaint(None)) };
    let factor = if unit.is_empty() { Some(1_000) } else { DURATION_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, ms)| *ms) };
    let Some(factor) = factor else {
        let meant = match unit.trim().to_lowercase().as_str() {
            "m" | "mins" | "minute" | "minutes" => Some("min"),
            "sec" | "secs" | "second" | "seconds" | "s" => Some("s"),
            "msec" | "millis" | "ms" => Some("ms"),
            "hr" | "hour" | "hours" | "h" => Some("h"),
            "day" | "days" | "d" => Some("d"),
            "min" => Some("min"),
            _ => None,
        };
        return Err(complaint(meant.map(|unit| format!("did you mean `{number}{unit}`?"))));
    };
    number.checked_mul(factor).map(Duration::from_millis).ok_or_else(|| complaint(None))
}

/// Units of sizes and their bytes.
const SIZE_UNITS: [(&str, u64); 3] = [("kB", 1 << 10), ("MB", 1 << 20), ("GB", 1 << 30)];

/// Reads `1048576`, `16kB`, `1MB`, `1GB`; a bare number is bytes, 1 kB = 1024.
pub(super) fn parse_size(text: &str) -> Result<u64, Complaint> {
    let complaint = |hint| Complaint { message: format!("expected a size such as 1048576, 16kB, 1MB or 1GB, found `{text}`"), hint };
    let Some((number, unit)) = split_unit(text) else { return Err(complaint(None)) };
    let factor = if unit.is_empty() { Some(1) } else { SIZE_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, bytes)| *bytes) };
    let Some(factor) = factor else {
        let meant = match unit.trim().to_lowercase().as_str() {
            "b" => Some(format!("{number}")),
            "k" | "ki" | "kib" | "kb" => Some(format!("{number}kB")),
            "m" | "mi" | "mib" | "mb" => Some(format!("{number}MB")),
            "g" | "gi" | "gib" | "gb" => Some(format!("{number}GB")),
            "t" | "ti" | "tib" | "tb" => number.checked_mul(1024).map(|number| format!("{number}GB")),
            _ => None,
        };
        return Err(complaint(meant.map(|meant| format!("did you mean `{meant}`?"))));
    };
    number.checked_mul(factor).ok_or_else(|| complaint(None))
}

/// A duration as people read it: the largest unit that leaves a whole number.
pub(super) fn show_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    let unit = DURATION_UNITS.iter().rev().find(|(_, factor)| millis.is_multiple_of(u128::from(*factor)) && millis >= u128::from(*factor));
    match unit {
        Some((name, factor)) => format!("{}{name}", millis / u128::from(*factor)),
        None => format!("{millis}ms"),
    }
}

/// A duration as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypedDuration(pub Duration);

/// A size as typed, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypedSize(pub u64);

/// Source text: `on`, `0640`, `12:30` as they stand.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Text(pub String);

/// The value of an operator's own tag: text, a number or a boolean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagValue(pub serde_json::Value);

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The walk hands every scalar over as its source text; see [`super::walk`].
fn from_source<'de, D: Deserializer<'de>, T>(deserializer: D, parse: fn(&str) -> Result<T, Complaint>) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).map_err(|complaint| serde::de::Error::custom(complaint.message))
}

impl<'de> Deserialize<'de> for TypedDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_source(deserializer, parse_duration).map(Self)
    }
}

impl<'de> Deserialize<'de> for TypedSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_source(deserializer, parse_size).map(Self)
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl<'de> Deserialize<'de> for TagValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        serde_json::Value::deserialize(deserializer).map(Self)
    }
}

/// JSON Schema for a scalar type. `format` is what [`super::shape`] tells them apart by; validators ignore formats they do not know.
macro_rules! scalar_schema {
    ($name:ident, $title:literal, $($schema:tt)+) => {
        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                $title.into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($($schema)+)
            }
        }
    };
}

scalar_schema!(TypedDuration, "duration", {
    "type": ["integer", "string"], "format": "pgherd-duration", "minimum": 0, "pattern": "^[0-9]+(ms|s|min|h|d)?$"
});
scalar_schema!(TypedSize, "size", {
    "type": ["integer", "string"], "format": "pgherd-size", "minimum": 0, "pattern": "^[0-9]+(kB|MB|GB)?$"
});
scalar_schema!(Text, "text", { "type": ["string", "number", "boolean"], "format": "pgherd-text" });
scalar_schema!(TagValue, "tag", { "type": ["string", "number", "boolean"], "format": "pgherd-tag" });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_the_defaults_document_says() {
        for (text, millis) in
            [("30", 30_000), ("500ms", 500), ("30s", 30_000), ("5min", 300_000), ("1h", 3_600_000), ("1d", 86_400_000), ("0", 0)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for wrong in ["", "s", "-1", "1.5s", "5 min", "5m", "1w", "30S", "99999999999999999999", "18446744073709551615d", "+3", "١"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_read_as_the_defaults_document_says() {
        for (text, bytes) in [("1048576", 1 << 20), ("16kB", 16 << 10), ("1MB", 1 << 20), ("1GB", 1 << 30), ("0", 0)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "kB", "-1", "1.5MB", "1 MB", "1Mi", "1mb", "1KB", "18446744073709551615kB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn units_of_other_tools_get_a_hint() {
        let hint = |complaint: Complaint| complaint.hint.unwrap();
        assert_eq!(hint(parse_duration("5m").unwrap_err()), "did you mean `5min`?");
        assert_eq!(hint(parse_size("1Mi").unwrap_err()), "did you mean `1MB`?");
        assert_eq!(hint(parse_size("2TB").unwrap_err()), "did you mean `2048GB`?");
    }

    #[test]
    fn a_shown_duration_reads_back_as_itself() {
        for millis in [0, 1, 500, 1_000, 1_500, 60_000, 90_000, 3_600_000, 86_400_000] {
            let duration = Duration::from_millis(millis);
            assert_eq!(parse_duration(&show_duration(duration)), Ok(duration));
        }
    }
}

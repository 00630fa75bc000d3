//! The TOML reader's messages, turned into ours.
//!
//! serde builds the messages of `deny_unknown_fields` and of wrong types in one fixed
//! form (`serde::de::Error`); what it leaves out, the key's path and the value found,
//! comes from the document at the error's span.

use std::ops::Range;

use toml::de::{DeTable, DeValue, Error};

use super::source::{Source, quote};
use crate::error::{UserError, find_nearest};

/// The document could not be read at all.
pub(super) fn explain_syntax(source: &Source, error: &Error) -> UserError {
    let span = error.span().unwrap_or(0..0);
    let found = source.cut(span.clone());
    let message = error.message();
    let what = match message {
        "duplicate key" => format!("the key {} is doubled", quote(found)),
        _ if found.is_empty() => format!("TOML syntax: {message}"),
        _ => format!("TOML syntax: {message}, found {}", quote(found)),
    };
    source.error(span, what)
}

/// The document could be read, and is not what it should be.
pub(super) fn explain_type(source: &Source, document: &DeTable<'_>, error: &Error) -> UserError {
    let span = error.span().unwrap_or(0..0);
    let place = locate(document, &span);
    let path = place.as_ref().map_or_else(Vec::new, |place| place.path.clone());
    let message = error.message();
    if let Some((key, known)) = split_unknown(message) {
        let table = name_table(source, path.split_last().map_or(&[][..], |(_, table)| table));
        let error = source
            .error(span, format!("unknown key {}", quote(key)))
            .why(format!("{table} has no such key"));
        return match find_nearest(key, known.iter().copied()) {
            Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
            None => error.help(format!("the keys are: {}", known.join(", "))),
        };
    }
    if let Some(key) = between(message, "missing field `", "`") {
        // A file of one table has the same span as that table. Only the error of a table
        // inside names its keys, after the message.
        let is_root = error.to_string().trim_end() == message;
        let path = if is_root { Vec::new() } else { path };
        let error = source.error(span, format!("missing key `{key}`"));
        return error.why(format!("{} needs it", name_table(source, &path)));
    }
    let expected = message.rsplit_once(", expected ").map(|(_, expected)| expected);
    let (Some(expected), Some(Place { value: Some(value), is_item, .. })) = (expected, place)
    else {
        return source.error(span, message);
    };
    let key = path.join(".");
    let is_header = source.cut(span.clone()).starts_with('[') && matches!(value, DeValue::Table(_));
    let subject = if is_item { format!("an item of `{key}`") } else { format!("`{key}`") };
    let what = format!("{subject} must be {}, not {}", name_expected(expected), name_found(value));
    let error = source.error(span, what);
    match expected {
        "a sequence" if is_header => error.help(format!("write `[[{key}]]`")),
        _ => error,
    }
}

/// The key and the known keys of serde's "unknown field `a`, expected one of `b`, `c`".
/// The key is typed by the user and may hold anything, the known ones hold no backtick.
fn split_unknown(message: &str) -> Option<(&str, Vec<&str>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (key, known) = rest.rsplit_once("`, expected ")?;
    Some((key, known.split('`').skip(1).step_by(2).collect()))
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    text.strip_prefix(before)?.strip_suffix(after)
}

/// Where a span stands: the keys that lead to it, and its value unless it is a key.
struct Place<'a> {
    path: Vec<&'a str>,
    value: Option<&'a DeValue<'a>>,
    /// The value is an item of the array at the path.
    is_item: bool,
}

fn locate<'a>(table: &'a DeTable<'a>, span: &Range<usize>) -> Option<Place<'a>> {
    table.iter().find_map(|(key, value)| {
        let mut place = if key.span() == *span {
            Place { path: Vec::new(), value: None, is_item: false }
        } else if value.span() == *span {
            Place { path: Vec::new(), value: Some(value.get_ref()), is_item: false }
        } else {
            locate_in_value(value.get_ref(), span)?
        };
        place.path.insert(0, key.get_ref());
        Some(place)
    })
}

fn locate_in_value<'a>(value: &'a DeValue<'a>, span: &Range<usize>) -> Option<Place<'a>> {
    match value {
        DeValue::Table(table) => locate(table, span),
        DeValue::Array(items) => items.iter().find_map(|item| match item.get_ref() {
            value if item.span() == *span => {
                Some(Place { path: Vec::new(), value: Some(value), is_item: true })
            }
            value => locate_in_value(value, span),
        }),
        _ => None,
    }
}

fn name_table(source: &Source, path: &[&str]) -> String {
    if path.is_empty() { source.noun().to_string() } else { format!("`{}`", path.join(".")) }
}

fn name_expected(expected: &str) -> &str {
    match expected {
        "a sequence" => "an array",
        "a map" => "a table",
        "u8" | "u32" => "a whole number",
        other => other,
    }
}

fn name_found(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the string {}", quote(text)),
        DeValue::Integer(number) => format!("the number {}", quote(&number.to_string())),
        DeValue::Float(number) => format!("the number {}", quote(&number.to_string())),
        DeValue::Boolean(value) => format!("`{value}`"),
        DeValue::Datetime(_) => "a date".to_string(),
        DeValue::Array(_) => "an array".to_string(),
        DeValue::Table(_) => "a table".to_string(),
    }
}

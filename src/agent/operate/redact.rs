//! Leaving secrets out of text: by their values in every usual form, and by the words that
//! stand before values nobody told us of.

use std::collections::BTreeSet;

use base64::Engine;
use base64::prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD};

const LEFT_OUT: &str = "[LEFT-OUT]";
/// Shorter values would be found by chance.
const SHORTEST: usize = 8;
/// What follows one of these is no business of a reader's.
const WORDS: [&str; 12] = [
    "password",
    "passwd",
    "passphrase",
    "secret",
    "token",
    "requirepass",
    "masterauth",
    "auth-pass",
    "auth_pass",
    "cipher-pass",
    "s3-key",
    "credential",
];

/// What is looked for.
pub struct Redactor {
    /// The longest first: one may be a part of another.
    values: Vec<String>,
}

impl Redactor {
    /// `secrets`: the values themselves; keys in PEM are taken apart into their lines.
    pub fn new<'s>(secrets: impl IntoIterator<Item = &'s str>) -> Self {
        let mut values = BTreeSet::new();
        for secret in secrets {
            for line in secret.lines().map(str::trim).filter(|line| !line.starts_with("-----")) {
                if line.len() >= SHORTEST {
                    values.extend(list_forms(line));
                }
            }
        }
        let mut values: Vec<String> = values.into_iter().collect();
        values.sort_by_key(|value| std::cmp::Reverse(value.len()));
        Redactor { values }
    }

    /// The text without any of them.
    pub fn redact(&self, text: &str) -> String {
        let mut text = text.to_string();
        for value in &self.values {
            if text.contains(value.as_str()) {
                text = text.replace(value.as_str(), LEFT_OUT);
            }
        }
        let mut clean = String::with_capacity(text.len());
        let mut in_key = false;
        for line in text.split_inclusive('\n') {
            if line.contains("PRIVATE KEY-----") {
                in_key = line.contains("-----BEGIN");
                clean += LEFT_OUT;
                clean.push('\n');
            } else if !in_key {
                clean += &redact_line(line);
            }
        }
        clean
    }

    /// Whether one of them is in the text in any form.
    pub fn finds_any(&self, text: &str) -> bool {
        self.values.iter().any(|value| text.contains(value.as_str()))
    }
}

/// As it is, in hexadecimal, in base64 wherever it begins, and as in a URL.
fn list_forms(secret: &str) -> Vec<String> {
    let bytes = secret.as_bytes();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let percent = |upper: bool| -> String {
        let escape = |byte: &u8| match byte {
            b if b.is_ascii_alphanumeric() || b"-_.~".contains(b) => char::from(*b).to_string(),
            b if upper => format!("%{b:02X}"),
            b => format!("%{b:02x}"),
        };
        bytes.iter().map(escape).collect()
    };
    let mut forms =
        vec![secret.to_string(), hex.to_uppercase(), hex, percent(true), percent(false)];
    for before in 0..3 {
        let mut shifted = vec![0; before];
        shifted.extend_from_slice(bytes);
        // The letters at both ends hang on what stands beside it.
        let whole = shifted.len() / 3 * 4;
        let first = [0, 2, 3][before];
        for encoded in
            [BASE64_STANDARD_NO_PAD.encode(&shifted), BASE64_URL_SAFE_NO_PAD.encode(&shifted)]
        {
            forms.push(encoded[first..whole].to_string());
        }
    }
    forms.retain(|form| form.len() >= SHORTEST);
    forms
}

/// `password: x`, `"secret" = "x"`, `requirepass x`, and hashes of passwords.
fn redact_line(line: &str) -> String {
    let mut line = line.to_string();
    for start in ["SCRAM-SHA-256$", "postgres://", "redis://", "rediss://", "postgresql://"] {
        if let Some(at) = line.find(start) {
            let rest = &line[at..];
            let end = rest.find(|c: char| c.is_whitespace() || "\"'".contains(c));
            let end = end.unwrap_or(rest.trim_end().len());
            line.replace_range(at..at + end, LEFT_OUT);
        }
    }
    let lower = line.to_ascii_lowercase();
    let Some(after) =
        WORDS.iter().filter_map(|word| lower.find(word).map(|at| at + word.len())).min()
    else {
        return line;
    };
    // The rest of the name, as in `password_file`, and then what parts it from the value.
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    let rest = &line[after..];
    let name = rest.find(|c: char| !is_name(c)).unwrap_or(rest.len());
    let is_parting = |c: char| " \t=:\"'".contains(c);
    let value = rest[name..].find(|c: char| !is_parting(c)).map(|at| after + name + at);
    let Some(value) = value.filter(|at| !line[*at..].trim().is_empty()) else { return line };
    let end = line[value..]
        .find(|c: char| c.is_whitespace() || "\"',;}".contains(c))
        .map_or(line.len(), |end| value + end);
    line.replace_range(value..end, LEFT_OUT);
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::prelude::BASE64_STANDARD;
    use proptest::prelude::*;

    const SECRET: &str = "s3cr3t/with+odd=letters.0123456789";

    #[test]
    fn a_secret_is_left_out_in_every_form() {
        let redactor = Redactor::new([SECRET]);
        let hex: String = SECRET.bytes().map(|b| format!("{b:02x}")).collect();
        let basic = BASE64_STANDARD.encode(format!("patroni:{SECRET}"));
        let url = SECRET.replace('/', "%2F").replace('+', "%2B").replace('=', "%3D");
        for form in [SECRET, &hex, &hex.to_uppercase(), &basic, &url] {
            let text = redactor.redact(&format!("GET x {form} HTTP"));
            assert!(text.contains(LEFT_OUT) && !redactor.finds_any(&text), "{text}");
        }
    }

    #[test]
    fn keys_and_unknown_passwords_are_left_out() {
        let redactor = Redactor::new([]);
        let pem = "a\n-----BEGIN PRIVATE KEY-----\nMIGHAgEA\n-----END PRIVATE KEY-----\nb\n";
        assert_eq!(redactor.redact(pem), "a\n[LEFT-OUT]\n[LEFT-OUT]\nb\n");
        for (line, clean) in [
            ("  password: hunter2\n", "  password: [LEFT-OUT]\n"),
            ("requirepass hunter2", "requirepass [LEFT-OUT]"),
            (
                "{\"secret_key\": \"hunter2\", \"a\": 1}",
                "{\"secret_key\": \"[LEFT-OUT]\", \"a\": 1}",
            ),
            ("repo1-cipher-pass=hunter2\n", "repo1-cipher-pass=[LEFT-OUT]\n"),
            ("alter role x SCRAM-SHA-256$4096:a$b:c\n", "alter role x [LEFT-OUT]\n"),
            ("connect postgres://a:b@h/x now", "connect [LEFT-OUT] now"),
            ("nothing here\n", "nothing here\n"),
            ("password\n", "password\n"),
        ] {
            assert_eq!(redactor.redact(line), clean);
        }
    }

    proptest! {
        #[test]
        fn no_form_survives_wherever_it_stands(
            before in "[ -~]{0,9}", secret in "[a-zA-Z0-9+/=_.-]{8,40}", after in "[ -~]{0,9}",
        ) {
            let redactor = Redactor::new([secret.as_str()]);
            let whole = format!("{before}{secret}{after}");
            for text in [BASE64_STANDARD.encode(&whole), whole] {
                let clean = redactor.redact(&text);
                prop_assert!(!clean.contains(&secret), "{clean}");
            }
        }
    }
}

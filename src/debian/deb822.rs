//! Control files: paragraphs of `Field: value` lines (deb822(5)). Everything is borrowed
//! from the text. Comments are not taken: the files of an archive have none.

use anyhow::{Result, bail};

/// More fields than any paragraph has.
const MAX_FIELDS: usize = 256;

/// One paragraph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paragraph<'a> {
    fields: Vec<Field<'a>>,
    line: usize,
}

/// One field with its continuation lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field<'a> {
    pub name: &'a str,
    /// What follows the colon, without the space around; continuation lines keep
    /// their line breaks and the space they begin with.
    pub value: &'a str,
    /// The line its name stands in, counted from 1.
    pub line: usize,
}

impl<'a> Paragraph<'a> {
    /// The value of a field; upper and lower case do not matter.
    pub fn get(&self, name: &str) -> Option<&'a str> {
        self.field(name).map(|field| field.value)
    }

    pub fn field(&self, name: &str) -> Option<Field<'a>> {
        self.fields.iter().find(|field| field.name.eq_ignore_ascii_case(name)).copied()
    }

    /// The value, or an error that names the field and the paragraph's line.
    pub fn require(&self, name: &str) -> Result<&'a str> {
        match self.get(name) {
            Some(value) if !value.is_empty() => Ok(value),
            _ => bail!("line {}: the paragraph has no field `{name}`", self.line),
        }
    }

    pub fn fields(&self) -> &[Field<'a>] {
        &self.fields
    }

    /// The line its first field stands in, counted from 1.
    pub fn line(&self) -> usize {
        self.line
    }
}

impl<'a> Field<'a> {
    /// The lines of the value, trimmed, without those that are empty.
    pub fn lines(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.value.lines().map(str::trim).filter(|line| !line.is_empty())
    }
}

/// The paragraphs of a control file, in order. After an error there is nothing more.
pub fn parse(text: &str) -> Paragraphs<'_> {
    Paragraphs { text, position: 0, line: 0 }
}

/// The one paragraph of a control file. Errors: none, or more than one.
pub fn parse_one(text: &str) -> Result<Paragraph<'_>> {
    let mut paragraphs = parse(text);
    let Some(first) = paragraphs.next().transpose()? else { bail!("the control file is empty") };
    match paragraphs.next().transpose()? {
        Some(second) => bail!("line {}: a second paragraph where one belongs", second.line),
        None => Ok(first),
    }
}

/// See [`parse`].
pub struct Paragraphs<'a> {
    text: &'a str,
    position: usize,
    /// Lines before `position`.
    line: usize,
}

impl<'a> Paragraphs<'a> {
    /// The next line without its break, and where it begins.
    fn next_line(&mut self) -> Option<(usize, &'a str)> {
        let start = self.position;
        let rest = &self.text[start..];
        if rest.is_empty() {
            return None;
        }
        let line = rest.split_once('\n').map_or(rest, |(line, _)| line);
        self.position = self.text.len().min(start + line.len() + 1);
        self.line += 1;
        Some((start, line.strip_suffix('\r').unwrap_or(line)))
    }

    fn read_paragraph(&mut self) -> Result<Option<Paragraph<'a>>> {
        let mut fields: Vec<Field<'a>> = Vec::new();
        let mut value_start = 0;
        while let Some((start, line)) = self.next_line() {
            let number = self.line;
            match line.as_bytes().first() {
                Some(b' ' | b'\t') if !line.trim_ascii().is_empty() => {
                    let Some(field) = fields.last_mut() else {
                        bail!("line {number}: a continuation line without a field");
                    };
                    field.value = self.text[value_start..start + line.len()].trim_ascii();
                }
                None | Some(b' ' | b'\t') => {
                    if !fields.is_empty() {
                        break;
                    }
                }
                Some(_) => {
                    let Some((name, value)) = line.split_once(':') else {
                        bail!("line {number}: neither a field nor a continuation line");
                    };
                    check_field(name, &fields).map_err(|e| e.context(format!("line {number}")))?;
                    value_start = start + name.len() + 1;
                    if fields.is_empty() {
                        fields.reserve(24);
                    }
                    fields.push(Field { name, value: value.trim_ascii(), line: number });
                }
            }
        }
        let Some(first) = fields.first() else { return Ok(None) };
        let line = first.line;
        Ok(Some(Paragraph { fields, line }))
    }
}

fn check_field(name: &str, fields: &[Field<'_>]) -> Result<()> {
    let is_name = name.bytes().all(|byte| byte.is_ascii_graphic());
    if name.is_empty() || !is_name || name.starts_with(['-', '#']) {
        bail!("not a field name: `{}`", name.chars().take(40).collect::<String>());
    }
    if fields.iter().any(|field| field.name.eq_ignore_ascii_case(name)) {
        bail!("the field `{name}` stands twice in one paragraph");
    }
    if fields.len() == MAX_FIELDS {
        bail!("a paragraph of more than {MAX_FIELDS} fields");
    }
    Ok(())
}

impl<'a> Iterator for Paragraphs<'a> {
    type Item = Result<Paragraph<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let paragraph = self.read_paragraph();
        if paragraph.is_err() {
            self.position = self.text.len();
        }
        paragraph.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paragraphs_fields_and_continuations_are_found() {
        let text = "\n\nPackage: a\nDepends: b,\n c\nDescription: short\n long\n .\n more\n\n \t\nPackage: d\r\nEmpty:\r\n";
        let all: Vec<_> = parse(text).collect::<Result<_>>().unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].get("depends"), Some("b,\n c"));
        assert_eq!(all[0].get("Description"), Some("short\n long\n .\n more"));
        assert_eq!(all[0].field("Depends").unwrap().line, 4);
        assert_eq!(all[0].line(), 3);
        assert_eq!(all[1].get("PACKAGE"), Some("d"));
        assert_eq!(all[1].get("Empty"), Some(""));
        assert_eq!(all[1].get("Depends"), None);
        assert!(all[1].require("Empty").is_err());
    }

    #[test]
    fn a_list_of_lines_is_read_line_by_line() {
        let text = "SHA256:\n aa 1 main/Packages\n bb 2 main/Packages.xz\nX: y";
        let release = parse_one(text).unwrap();
        let lines: Vec<_> = release.field("sha256").unwrap().lines().collect();
        assert_eq!(lines, ["aa 1 main/Packages", "bb 2 main/Packages.xz"]);
        assert_eq!(release.get("x"), Some("y"));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, expected) in [
            (" a\n", "line 1: a continuation line"),
            ("A: b\nnonsense\n", "line 2: neither a field"),
            ("A: b\n\nB: c\nb: d\n", "line 4"),
            (": x\n", "line 1"),
            ("-A: x\n", "line 1"),
            ("# x: y\n", "line 1"),
        ] {
            let error = parse(text).collect::<Result<Vec<_>>>().unwrap_err();
            assert!(format!("{error:#}").starts_with(expected), "{text:?}: {error:#}");
        }
        assert!(parse_one("A: b\n\nA: c\n").is_err());
        assert!(parse_one("\n").is_err());
    }

    #[test]
    fn too_many_fields_are_refused() {
        let text: String = (0..10_000).map(|i| format!("F{i}: x\n")).collect();
        let error = parse(&text).next().unwrap().unwrap_err();
        assert!(format!("{error:#}").starts_with("line 257"), "{error:#}");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            paragraphs in prop::collection::vec(
                prop::collection::btree_map("[A-Z][a-z-]{0,8}", "[!-~]([ -~]{0,20}[!-~])?(\n [!-~]{1,9}){0,3}", 1..6),
                0..5,
            ),
            break_lines_with in prop::sample::select(vec!["\n", "\n\n", "\n \n"]),
        ) {
            let text: String = paragraphs
                .iter()
                .map(|fields| {
                    let lines: String = fields.iter().map(|(n, v)| format!("{n}: {v}\n")).collect();
                    lines + break_lines_with
                })
                .collect();
            let read: Vec<_> = parse(&text).collect::<Result<_>>().unwrap();
            prop_assert_eq!(read.len(), paragraphs.len());
            for (read, written) in read.iter().zip(&paragraphs) {
                prop_assert_eq!(read.fields().len(), written.len());
                for (name, value) in written {
                    prop_assert_eq!(read.get(&name.to_uppercase()), Some(value.as_str()));
                }
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in "([A-Za-z]{0,2}:?[ é\r\n\t#:.-]{0,2}){0,30}") {
            let _ = parse(&text).count();
        }
    }
}

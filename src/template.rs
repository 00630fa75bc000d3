//! Templates: the Jinja language (minijinja), strict and bounded.
//!
//! Used by the builder for what lies in `tree/` and by the agent for what lies in
//! `boot/`, so it knows the types of neither. A template reads its variables and
//! nothing else: no other template, no file, no clock, no environment.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior};
use serde::Serialize;

use crate::error::{UserError, find_nearest};

/// Steps of the template engine that one template may take.
const MAX_STEPS: u64 = 2_000_000;
/// Bytes that one template may write.
const MAX_OUTPUT: usize = 16 << 20;
/// Bytes that one template may have.
const MAX_SOURCE: usize = 128 << 10;
/// Stack for the engine: macros may call each other, and chains recurse.
const STACK_BASE: usize = 8 << 20;
const STACK_PER_BYTE: usize = 2 << 10;
/// Columns by which the filter `indent` may indent.
const MAX_INDENT: usize = 200;

/// Render `text`; `path` names it in errors. `variables` must serialize to a table.
///
/// Blocks alone on their line leave no empty line, and the last newline is kept. A
/// variable that is not defined is an error.
///
/// # Errors
/// A [`UserError`] with file and line: bad syntax, an undefined variable, whatever the
/// template does wrong, too many steps, too much output.
pub fn render(text: &str, path: &Path, variables: &impl Serialize) -> Result<String> {
    let variables = Value::from(Serde(variables));
    run_on_deep_stack(text, path, || render_here(text, path, &variables))
}

/// Check the syntax of a template that somebody else renders later.
pub fn check_syntax(text: &str, path: &Path) -> Result<()> {
    run_on_deep_stack(text, path, || compile(&make_environment(), text, path).map(drop))
}

/// Run `work` on a thread whose stack suits the length of the template: the engine
/// recurses over chains such as `1+1+1+...`, at most once for each byte.
fn run_on_deep_stack<T: Send>(
    text: &str,
    path: &Path,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    if text.len() > MAX_SOURCE {
        return Err(UserError::new("the template is too long")
            .in_file(path)
            .why(format!("a template may have {} KiB", MAX_SOURCE >> 10))
            .help("let a plain file hold what does not change")
            .into());
    }
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .stack_size(STACK_BASE + text.len() * STACK_PER_BYTE)
            .spawn_scoped(scope, work)
            .with_context(|| format!("starting a thread to render {}", path.display()))?
            .join()
            .unwrap_or_else(|_| bail!("the template engine gave up on {}", path.display()))
    })
}

fn render_here(text: &str, path: &Path, variables: &Value) -> Result<String> {
    let environment = make_environment();
    let template = compile(&environment, text, path)?;
    let mut output = Bounded::default();
    let rendered = template.render_captured_to(variables.clone(), &mut output).map(drop);
    if output.full {
        return Err(UserError::new("the template writes too much")
            .in_file(path)
            .why(format!("a template may write {} MiB", MAX_OUTPUT >> 20))
            .help("look for a loop over too many items")
            .into());
    }
    rendered.map_err(|error| explain(error, path, variables))?;
    Ok(String::from_utf8(output.bytes).expect("a template writes text"))
}

fn make_environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .keep_trailing_newline(true)
        .build()
        .expect("the default delimiters are valid");
    environment.set_syntax(syntax);
    // What is escaped must not hang on the file's name.
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(MAX_STEPS));
    // Errors then know the name of the variable that is undefined.
    environment.set_debug(true);
    environment.remove_global("debug");
    // Widths from a template would be sizes of allocations.
    environment.remove_filter("format");
    environment.add_filter("indent", indent);
    environment
}

/// The filter `indent(width=4, first=false)`: empty lines stay empty.
fn indent(text: String, width: Option<usize>, first: Option<bool>) -> Result<String, Error> {
    let width = width.unwrap_or(4);
    if width > MAX_INDENT {
        let detail = format!("indent by {width} columns (at most {MAX_INDENT})");
        return Err(Error::new(ErrorKind::InvalidOperation, detail));
    }
    let mut indented = String::with_capacity(text.len());
    for (i, line) in text.split_inclusive('\n').enumerate() {
        let wanted = i > 0 || first.unwrap_or(false);
        if wanted && !line.trim().is_empty() {
            indented.extend(std::iter::repeat_n(' ', width));
        }
        indented.push_str(line);
    }
    Ok(indented)
}

fn compile<'env, 'text>(
    environment: &'env Environment<'text>,
    text: &'text str,
    path: &Path,
) -> Result<minijinja::Template<'env, 'text>>
where
    'env: 'text,
{
    environment
        .template_from_named_str("template", text)
        .map_err(|error| explain(error, path, &Value::UNDEFINED))
}

/// Output that ends at [`MAX_OUTPUT`].
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT {
            self.full = true;
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn explain(error: Error, path: &Path, variables: &Value) -> anyhow::Error {
    let detail = error.detail().unwrap_or_default();
    let explained = match (error.kind(), find_undefined(detail)) {
        (ErrorKind::SyntaxError, _) => UserError::new(format!("template syntax: {detail}")),
        (ErrorKind::OutOfFuel, _) => UserError::new("the template takes too long")
            .why(format!("it took more than {MAX_STEPS} steps"))
            .help("look for a loop over too many items"),
        (_, Some(name)) => explain_undefined(name, variables),
        (kind, None) if detail.is_empty() => UserError::new(format!("template: {kind}")),
        (kind, None) => UserError::new(format!("template: {kind}: {detail}")),
    };
    match error.line() {
        Some(line) => explained.at(path, line),
        None => explained.in_file(path),
    }
    .into()
}

/// The name in the engine's "`a.b` is undefined".
fn find_undefined(detail: &str) -> Option<&str> {
    let (before, _) = detail.split_once("` is undefined")?;
    before.rsplit_once('`').map(|(_, name)| name)
}

fn explain_undefined(name: &str, variables: &Value) -> UserError {
    let error = UserError::new(format!("undefined variable `{name}`"));
    let (parent, last) = name.rsplit_once('.').unwrap_or(("", name));
    // The deepest table on the way there that exists.
    let table = parent.split('.').filter(|part| !part.is_empty()).try_fold(
        variables.clone(),
        |value, part| {
            let value = value.get_attr(part).ok()?;
            (value.kind() == ValueKind::Map).then_some(value)
        },
    );
    let known: Vec<String> = table
        .and_then(|table| {
            table.try_iter().ok().map(|keys| keys.map(|key| key.to_string()).collect())
        })
        .unwrap_or_default();
    let prefix = if parent.is_empty() { String::new() } else { format!("{parent}.") };
    match find_nearest(last, known.iter().map(String::as_str)) {
        Some(nearest) => error.help(format!("did you mean `{prefix}{nearest}`?")),
        None if known.is_empty() => error,
        None if parent.is_empty() => error.help(format!("the variables are: {}", known.join(", "))),
        None => error.help(format!("`{parent}` has: {}", known.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn render_text(text: &str, variables: serde_json::Value) -> Result<String> {
        render(text, Path::new("layers/db/tree/etc/x.j2"), &variables)
    }

    fn fail(text: &str, variables: serde_json::Value) -> String {
        let error = render_text(text, variables).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 2);
        error.to_string()
    }

    #[test]
    fn blocks_leave_no_empty_lines_and_the_last_newline_stays() {
        let text = "a\n  {% if on %}\nb {{ name }}\n  {% endif %}\nc\n";
        assert_eq!(render_text(text, json!({"on": true, "name": "<x>"})).unwrap(), "a\nb <x>\nc\n");
    }

    #[test]
    fn a_misspelt_variable_is_named_with_its_line_and_the_nearest() {
        assert_eq!(
            fail("a\n{{ clustr }}\n", json!({"cluster": 1, "domain": 2})),
            "undefined variable `clustr`\n  at: layers/db/tree/etc/x.j2:2\n  help: did you mean `cluster`?"
        );
        assert_eq!(
            fail("\n\n{{ db.prot }}", json!({"db": {"host": 1, "port": 2}})),
            "undefined variable `db.prot`\n  at: layers/db/tree/etc/x.j2:3\n  help: did you mean `db.port`?"
        );
        assert_eq!(
            fail("{{ db.zzzzzz }}", json!({"db": {"host": 1, "port": 2}})),
            "undefined variable `db.zzzzzz`\n  at: layers/db/tree/etc/x.j2:1\n  help: `db` has: host, port"
        );
        assert_eq!(
            fail("{{ wholly.wrong.here }}", json!({"db": 1})),
            "undefined variable `wholly`\n  at: layers/db/tree/etc/x.j2:1\n  help: the variables are: db"
        );
        assert_eq!(
            fail("{{ x }}", json!({})),
            "undefined variable `x`\n  at: layers/db/tree/etc/x.j2:1"
        );
    }

    #[test]
    fn an_undefined_variable_is_an_error_wherever_it_is_used() {
        for text in [
            "{% if no %}{% endif %}",
            "{% for x in no %}{% endfor %}",
            "{{ no + 1 }}",
            "{{ no | upper }}",
            "{{ no | indent }}",
            "{{ 'a' ~ no }}",
            "{% if no == 1 %}{% endif %}",
        ] {
            let error = fail(text, json!({}));
            assert!(error.starts_with("undefined variable `no`\n"), "{text}: {error}");
        }
        assert_eq!(render_text("{{ no | default(3) }}", json!({})).unwrap(), "3");
        assert_eq!(render_text("{{ no is defined }}", json!({})).unwrap(), "False");
    }

    #[test]
    fn bad_syntax_names_its_line() {
        assert_eq!(
            fail("a\nb\n{% if %}\n", json!({})),
            "template syntax: unexpected end of block\n  at: layers/db/tree/etc/x.j2:3"
        );
        assert!(check_syntax("{{ a.b }}", Path::new("x.j2")).is_ok());
        assert!(check_syntax("{{ a. }}", Path::new("x.j2")).is_err());
    }

    #[test]
    fn an_unknown_filter_is_named() {
        assert_eq!(
            fail("{{ 1 | lowwer }}", json!({})),
            "template: unknown filter: filter lowwer is unknown\n  at: layers/db/tree/etc/x.j2:1"
        );
    }

    #[test]
    fn templates_reach_no_other_file() {
        for text in [
            "{% include '/etc/passwd' %}",
            "{% import 'x' as x %}",
            "{% from 'x' import y %}",
            "{% extends 'x' %}",
            "{{ debug() }}",
            "{{ '%9999999999d' | format(1) }}",
        ] {
            fail(text, json!({}));
        }
    }

    #[test]
    fn a_template_that_loops_for_ever_is_stopped() {
        let nested =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert_eq!(
            fail(nested, json!({})),
            "the template takes too long\n  at: layers/db/tree/etc/x.j2:1\n  why: it took more than 2000000 steps\n  help: look for a loop over too many items"
        );
        let output = "{% for a in range(9999) %}{{ 'x' * 65536 }}{% endfor %}";
        assert_eq!(
            fail(output, json!({})),
            "the template writes too much\n  at: layers/db/tree/etc/x.j2\n  why: a template may write 16 MiB\n  help: look for a loop over too many items"
        );
        let recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
        fail(recursion, json!({}));
        fail("{{ 'x' | indent(99999999999) }}", json!({}));
    }

    #[test]
    fn the_deepest_templates_do_not_overflow_the_stack() {
        let chains = [
            ("{{ ", "(", "1", ")", " }}"),
            ("{{ ", "[", "1", "]", " }}"),
            ("{{ ", "not ", "1", "", " }}"),
            ("{{ ", "-", "1", "", " }}"),
            ("{{ ", "1+", "1", "", " }}"),
            ("{{ ", "1~", "1", "", " }}"),
            ("{{ ", "1 and ", "1", "", " }}"),
            ("{{ ", "1 if 1 else ", "1", "", " }}"),
            ("{{ ", "", "a", ".a", " }}"),
            ("{{ ", "", "a", "|e", " }}"),
            ("{{ ", "", "a", "[0]", " }}"),
            ("{{ ", "", "a", "()", " }}"),
            ("{{ ", "", "a", " is odd", " }}"),
            ("", "{% if a %}", "", "{% endif %}", ""),
            ("{% if a %}", "{% elif a %}", "", "", "{% endif %}"),
        ];
        for (begin, open, middle, close, end) in chains {
            let room = MAX_SOURCE - begin.len() - middle.len() - end.len();
            let n = room / (open.len() + close.len());
            let text = format!("{begin}{}{middle}{}{end}", open.repeat(n), close.repeat(n));
            if let Err(error) = render_text(&text, json!({"a": 1})) {
                assert_eq!(crate::error::exit_code(&error), 2, "{error}");
            }
        }
        assert_eq!(
            fail(&"x".repeat(MAX_SOURCE + 1), json!({})),
            "the template is too long\n  at: layers/db/tree/etc/x.j2\n  why: a template may have 128 KiB\n  help: let a plain file hold what does not change"
        );
    }

    #[test]
    fn text_is_indented_but_empty_lines_are_not() {
        let text = "{{ 'a\\n\\nb\\n' | indent(2) }}";
        assert_eq!(render_text(text, json!({})).unwrap(), "a\n\n  b\n");
        assert_eq!(render_text("{{ 'a' | indent(2, true) }}", json!({})).unwrap(), "  a");
    }

    proptest! {
        #[test]
        fn whatever_the_template_it_never_panics(text in "(\\{\\{|\\}\\}|\\{%|%\\}|for|in|if|else|end(for|if)|[ -~\n]|a|\\||é){0,60}") {
            let _ = render_text(&text, json!({"a": [1, {"b": "c"}]}));
        }

        #[test]
        fn text_without_marks_comes_back_unchanged(text in "[^{}#%]{0,200}") {
            prop_assert_eq!(render_text(&text, json!({})).unwrap(), text);
        }
    }
}

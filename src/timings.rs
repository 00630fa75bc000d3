//! Where the time of a command went: its steps as a table, and those that it waited for.

use std::fmt::Write;

use crate::progress::StepTime;

/// Steps that begin within so many seconds of another's end count as waiting for it.
const SLACK: f64 = 0.05;

/// The steps without which the command would have ended sooner, first to last: from the step
/// that ended last back to the one that ended last before that began, and so on.
pub fn find_critical_path(steps: &[StepTime]) -> Vec<&StepTime> {
    let end = |step: &StepTime| step.began + step.seconds;
    // Each begins before the next: steps of no length would otherwise wait for themselves.
    let latest = |before: f64| {
        let is_before = |step: &&StepTime| end(step) <= before + SLACK && step.began < before;
        steps.iter().filter(is_before).max_by(|a, b| end(a).total_cmp(&end(b)))
    };
    let mut path: Vec<&StepTime> = Vec::new();
    let mut at = latest(f64::INFINITY);
    while let Some(step) = at {
        path.push(step);
        at = latest(step.began);
    }
    path.reverse();
    path
}

/// The table of all steps in the order in which they began, `*` before those of the critical
/// path; `total` is what the whole command took, in seconds.
pub fn show_timings(steps: &[StepTime], total: f64) -> String {
    let critical = find_critical_path(steps);
    let mut rows: Vec<&StepTime> = steps.iter().collect();
    rows.sort_by(|a, b| a.began.total_cmp(&b.began));
    let width = rows.iter().map(|step| step.step.chars().count()).max().unwrap_or(0).max(4);
    let mut text = format!("  {:<width$}  {:>8}  {:>8}  {:>5}\n", "step", "began", "seconds", "");
    for step in rows {
        let mark = if critical.iter().any(|one| std::ptr::eq(*one, step)) { '*' } else { ' ' };
        let share = if total > 0.0 { 100.0 * step.seconds / total } else { 0.0 };
        let note = if step.cached { "cached" } else { step.note.as_str() };
        let line = format!(
            "{mark} {:<width$}  {:>8.2}  {:>8.2}  {share:>4.0}%  {note}",
            step.step, step.began, step.seconds
        );
        text += line.trim_end();
        text.push('\n');
    }
    let waited: f64 = critical.iter().map(|step| step.seconds).sum();
    let _ = write!(
        text,
        "critical path (*): {waited:.2} s in {} steps; {:.2} s in none, of {total:.2} s",
        critical.len(),
        (total - waited).max(0.0)
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str, began: f64, seconds: f64) -> StepTime {
        StepTime { step: name.into(), began, seconds, cached: false, note: String::new() }
    }

    fn names(steps: &[StepTime]) -> Vec<&str> {
        find_critical_path(steps).into_iter().map(|step| step.step.as_str()).collect()
    }

    #[test]
    fn the_path_leads_from_the_end_to_what_was_waited_for() {
        // `hash` ran beside `pack`, which took longer.
        let steps = [
            step("fetch", 0.0, 2.0),
            step("unpack", 2.0, 5.0),
            step("hash", 7.0, 1.0),
            step("pack", 7.0, 3.0),
            step("publish", 10.0, 0.5),
        ];
        assert_eq!(names(&steps), ["fetch", "unpack", "pack", "publish"]);
    }

    #[test]
    fn gaps_and_steps_without_length_do_not_stop_it() {
        let steps = [step("a", 0.0, 1.0), step("b", 3.0, 0.0), step("c", 3.0, 1.0)];
        assert_eq!(names(&steps), ["a", "c"]);
        assert!(names(&[]).is_empty());
        assert_eq!(names(&[step("only", 0.0, 0.0)]), ["only"]);
    }

    #[test]
    fn the_table_marks_them_and_adds_up() {
        let mut cached = step("base packages", 0.0, 0.01);
        cached.cached = true;
        let text = show_timings(&[cached, step("disk", 0.01, 0.99)], 2.0);
        assert!(text.contains("* base packages") && text.contains("cached"), "{text}");
        assert!(text.ends_with("1.00 s in 2 steps; 1.00 s in none, of 2.00 s"), "{text}");
    }
}

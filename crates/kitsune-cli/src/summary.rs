//! Formats tables: labels in the left column, values in the right.

/// One line per row, with the values in one column and continuation lines of a value below its first line.
pub(crate) fn table(rows: &[(&str, String)]) -> String {
    let width = rows
        .iter()
        .map(|(label, _)| label.chars().count())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for (label, value) in rows {
        let mut label = *label;
        for line in value.split('\n') {
            text.push_str(format!("{label:<width$}  {line}").trim_end());
            text.push('\n');
            label = "";
        }
    }
    text
}

/// `count` with a noun: `1 step`, `2 steps`.
pub(crate) fn plural(count: u64, noun: &str) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_in_one_column() {
        let rows = [
            ("a", "1".to_owned()),
            ("long", "2\n3".to_owned()),
            ("b", String::new()),
        ];
        assert_eq!(table(&rows), "a     1\nlong  2\n      3\nb\n");
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(
            [0, 1, 2].map(|n| plural(n, "step")).join(" "),
            "0 steps 1 step 2 steps"
        );
    }
}

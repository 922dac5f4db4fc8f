//! Text and numbers as they stand in HTML and SVG.

/// Text as text, also between the double quotes of an attribute. Characters that HTML does not have are shown as such.
pub(super) fn text(raw: &str) -> String {
    let mut escaped = String::with_capacity(raw.len());
    for character in raw.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(character),
            c if c.is_control() || ('\u{fdd0}'..='\u{fdef}').contains(&c) || (c as u32) & 0xfffe == 0xfffe => {
                escaped.push('\u{fffd}');
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// A name among words of the page, whatever direction it is written in.
pub(super) fn name(raw: &str) -> String {
    format!("<bdi>{}</bdi>", text(raw))
}

/// The beginning of a text of which all is to be read elsewhere.
pub(super) fn beginning(raw: &str, characters: usize) -> String {
    match raw.char_indices().nth(characters) {
        Some((end, _)) => format!("{}…", &raw[..end]),
        None => raw.to_owned(),
    }
}

/// The beginning of a name that takes no more than so many columns; what wide characters take is counted. It may be read
/// from the right, and stays where it is then.
pub(super) fn shortened(raw: &str, columns: usize) -> String {
    let mut taken = 0;
    let mut short = String::new();
    for character in raw.chars() {
        let width = if character < '\u{1100}' { 1 } else { 2 };
        if taken + width > columns.saturating_sub(1) {
            short.push('…');
            break;
        }
        taken += width;
        // A drawing has one line a name, and what changes the direction stays in the name.
        short.push(if character.is_whitespace() { ' ' } else { character });
    }
    text(
        &short.replace(
            ['\u{202a}', '\u{202b}', '\u{202d}', '\u{202e}', '\u{2066}', '\u{2067}', '\u{2068}'],
            "\u{fffd}",
        ),
    )
}

/// A whole number with its thousands apart.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Milliseconds: a tenth where there are few, whole ones where there are many.
pub(super) fn ms(value: f64) -> String {
    let sign = if value < 0.0 { "−" } else { "" };
    let value = value.abs();
    if value < 9.95 { format!("{sign}{value:.1}") } else { format!("{sign}{}", count(value.round() as u64)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_text_whatever_is_in_it() {
        assert_eq!(text("<b a=\"1\" c='2'>&"), "&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;");
        assert_eq!(text("a\0b\u{7f}c\u{ffff}"), "a\u{fffd}b\u{fffd}c\u{fffd}");
        assert_eq!(shortened("abcdef", 6), "abcde…");
        assert_eq!(shortened("abcde", 6), "abcde");
        assert_eq!(shortened("日本語日本語", 6), "日本…");
        assert_eq!(shortened("a\u{202e}b\nc", 9), "a\u{fffd}b c");
    }

    #[test]
    fn numbers_are_grouped_and_rounded() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.04, 9.94, 9.96, 1234.5, -12.0].map(ms), ["0.0", "9.9", "10", "1,235", "−12"]);
    }
}

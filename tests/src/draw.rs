//! Trees of volumes drawn in text, source and destination side by side.

/// A volume to draw, with what is based on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Branch {
    /// Its name.
    pub name: String,
    /// What stands behind the name, e.g. a size.
    pub detail: String,
    /// What is based on it, from top to bottom.
    pub children: Vec<Branch>,
}

/// Columns between the two trees.
const GAP: &str = "   ";

impl Branch {
    /// A volume on which nothing is based yet.
    pub fn new(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), detail: detail.into(), children: Vec::new() }
    }

    /// The same with a volume based on it.
    #[must_use]
    pub fn with(mut self, child: Branch) -> Self {
        self.children.push(child);
        self
    }
}

/// Draws trees under a title, in a frame beside other trees in another; ends with a line feed.
pub fn side_by_side(left: (&str, &[Branch]), right: (&str, &[Branch])) -> String {
    let (left, right) = (frame(left.0, left.1), frame(right.0, right.1));
    let (left_width, right_width) = (width(&left), width(&right));
    let height = left.len().max(right.len());
    let mut text = String::new();
    for row in 0..height {
        let (left, right) = (cell(&left, row, height, left_width), cell(&right, row, height, right_width));
        text.push_str(&format!("{left}{GAP}{right}\n"));
    }
    text
}

/// Draws trees, one line a volume.
pub fn draw(trees: &[Branch]) -> Vec<String> {
    let mut rows = Vec::new();
    for tree in trees {
        rows.push((tree.name.clone(), tree.detail.as_str()));
        children(tree, "", &mut rows);
    }
    let names = rows.iter().map(|(name, _)| columns(name)).max().unwrap_or(0);
    let details = rows.iter().map(|(_, detail)| columns(detail)).max().unwrap_or(0);
    let line = |(name, detail): &(String, &str)| {
        format!("{}  {}{detail}", pad(name, names), " ".repeat(details - columns(detail)))
    };
    rows.iter().map(|row| line(row).trim_end().to_owned()).collect()
}

/// Bytes in the unit in which people read them.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let power = (bytes.ilog2() / 10).min(UNITS.len() as u32);
    let value = bytes as f64 / (1u64 << (10 * power)) as f64;
    format!("{value:.1} {}", UNITS[power as usize - 1])
}

fn children<'a>(branch: &'a Branch, indent: &str, rows: &mut Vec<(String, &'a str)>) {
    let last = branch.children.len().saturating_sub(1);
    for (index, child) in branch.children.iter().enumerate() {
        let (corner, below) = if index == last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        rows.push((format!("{indent}{corner}{}", child.name), child.detail.as_str()));
        children(child, &format!("{indent}{below}"), rows);
    }
}

/// A frame without its bottom line, which [`cell`] puts as low as the taller neighbour needs it.
fn frame(title: &str, trees: &[Branch]) -> Vec<String> {
    let mut lines = draw(trees);
    if lines.is_empty() {
        lines.push("(empty)".to_owned());
    }
    let inner = lines.iter().map(|line| columns(line)).max().unwrap_or(0).max(columns(title));
    let rule = "─".repeat(inner - columns(title));
    let mut framed = vec![format!("┌ {title} {rule}┐")];
    framed.extend(lines.iter().map(|line| format!("│ {} │", pad(line, inner))));
    framed.push(format!("└{}┘", "─".repeat(inner + 2)));
    framed
}

/// A row of a frame that is as high as its neighbour.
fn cell(frame: &[String], row: usize, height: usize, width: usize) -> String {
    let bottom = frame.len() - 1;
    if row < bottom {
        frame[row].clone()
    } else if row == height - 1 {
        frame[bottom].clone()
    } else {
        format!("│{}│", " ".repeat(width - 2))
    }
}

fn width(lines: &[String]) -> usize {
    lines.iter().map(|line| columns(line)).max().unwrap_or(0)
}

fn pad(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(columns(text))))
}

/// Columns on a terminal; names here are of narrow characters.
fn columns(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The worked example of xen-api's doc/content/xapi/storage/sxm/sxm-v3-with-snapshot.md.
    fn example() -> Vec<Branch> {
        let right =
            Branch::new("snap3", "2.0 MiB").with(Branch::new("snap4", "1.0 MiB").with(Branch::new("disk", "64 B")));
        vec![Branch::new("snap1", "40.0 MiB").with(Branch::new("snap2", "8.0 MiB")).with(right)]
    }

    #[test]
    fn a_tree_with_a_branch_is_drawn_with_its_sizes_in_a_column() {
        let expected = [
            "snap1          40.0 MiB",
            "├─ snap2        8.0 MiB",
            "└─ snap3        2.0 MiB",
            "   └─ snap4     1.0 MiB",
            "      └─ disk      64 B",
        ];
        assert_eq!(draw(&example()), expected);
    }

    #[test]
    fn two_trees_stand_side_by_side_in_frames_of_one_height() {
        let text = side_by_side(("source", &[]), ("destination", &example()));
        let expected = "\
┌ source ─┐   ┌ destination ────────────┐
│ (empty) │   │ snap1          40.0 MiB │
│         │   │ ├─ snap2        8.0 MiB │
│         │   │ └─ snap3        2.0 MiB │
│         │   │    └─ snap4     1.0 MiB │
│         │   │       └─ disk      64 B │
└─────────┘   └─────────────────────────┘
";
        assert_eq!(text, expected, "\n{text}");
    }

    #[test]
    fn a_long_title_widens_its_frame() {
        let text = side_by_side(("a very long title", &[Branch::new("x", "")]), ("y", &[]));
        let widths: Vec<usize> = text.lines().map(columns).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "\n{text}");
    }

    #[test]
    fn sizes_are_told_in_their_unit() {
        let told: Vec<String> = [0, 1023, 1024, 1536, 3 << 20, 1 << 40].map(size).into();
        assert_eq!(told, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "3.0 MiB", "1.0 TiB"]);
    }
}

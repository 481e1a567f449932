//! How disks look: on a terminal, which may be of any size, or as text.

use std::fmt::Write;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table};

use super::rates::{Rate, SortKey};
use super::state::{News, Top};
use crate::report::Time;
use crate::size::Human;

/// The columns behind the name, with their widths: all fit into 80 with a name of 20 letters.
static COLUMNS: [(&str, u16); 8] = [
    ("IOPS", 6),
    ("READ/s", 8),
    ("WRITE/s", 8),
    ("P50", 6),
    ("P99", 6),
    ("QUEUE", 5),
    ("ALLOC", 8),
    ("HELD", 5),
];

/// Letters of a name that are shown however narrow the terminal is.
const LEAST_NAME: u16 = 12;

/// What a disk's row says, behind its name.
fn cells(rate: &Rate) -> [String; 8] {
    let time = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), |us| Time(us).to_string());
    let bytes = |bytes: u64| match bytes {
        0 => "-".to_owned(),
        bytes => Human(bytes).to_string(),
    };
    let number = |number: u64| match number {
        0 => "-".to_owned(),
        1..1_000_000 => number.to_string(),
        1_000_000.. => format!("{}k", number / 1000),
    };
    let held = match rate.throttled_percent {
        0 => "-".to_owned(),
        percent => format!("{}%", percent.min(9999)),
    };
    [
        number(rate.iops),
        bytes(rate.read_bps),
        bytes(rate.write_bps),
        time(rate.p50_us),
        time(rate.p99_us),
        number(rate.in_flight),
        bytes(rate.allocated_bytes),
        held,
    ]
}

/// One line about all of them.
fn summary(top: &Top) -> String {
    let all = top.all();
    let sum = |of: fn(&Rate) -> u64| all.iter().map(of).sum::<u64>();
    let busy = all.iter().filter(|rate| rate.iops > 0).count();
    let failed = all.iter().filter(|rate| rate.failed).count();
    let mut line = format!(
        "{} disks, {busy} busy: {} IOPS, read {}/s, write {}/s, {} in flight",
        all.len(),
        sum(|rate| rate.iops),
        Human(sum(|rate| rate.read_bps)),
        Human(sum(|rate| rate.write_bps)),
        sum(|rate| rate.in_flight),
    );
    if failed > 0 {
        let _ = write!(line, ", {failed} FAILED");
    }
    line
}

/// What is the matter, if something is.
fn notice(top: &Top) -> Option<String> {
    let trouble = top.trouble.as_ref();
    let trouble = trouble.map(|why| format!("no answer, asking again: {why}"));
    let news = top.news().map(|news| match news {
        News::Back => "the daemon answers again",
        News::Restarted => "the daemon was restarted",
    });
    trouble.or_else(|| news.map(str::to_owned))
}

/// All as text, for those who read it later.
pub(super) fn text(top: &Top) -> String {
    let shown = top.shown();
    let longest = shown.iter().map(|rate| rate.name.chars().count());
    let name_width = longest.max().unwrap_or(0).max(4);
    let mut text = summary(top) + "\n";
    if let Some(notice) = notice(top) {
        text += &format!("{notice}\n");
    }
    let mut line = |name: &str, cells: &[String; 8]| {
        let _ = write!(text, "{name:<name_width$}");
        for (cell, (_, width)) in cells.iter().zip(COLUMNS) {
            let _ = write!(text, " {cell:>width$}", width = usize::from(width));
        }
        text += "\n";
    };
    line("NAME", &COLUMNS.map(|(name, _)| name.to_owned()));
    for rate in &shown {
        line(&rate.name, &cells(rate));
    }
    text
}

/// All on a terminal.
pub(super) fn draw(frame: &mut Frame<'_>, top: &mut Top) {
    let rows = [
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(1),
    ];
    let [head, told, table, foot] = Layout::vertical(rows).areas(frame.area());
    let title = Span::from("vdi top").bold();
    let socket = format!("  {}", top.socket.display());
    frame.render_widget(Line::from(vec![title, socket.dim()]), head);
    let told_line = match notice(top) {
        Some(notice) => Line::from(notice).red().bold(),
        None if top.is_informed() => Line::from(summary(top)),
        None => Line::from("asking ..."),
    };
    frame.render_widget(told_line, told);
    draw_table(frame, table, top);
    frame.render_widget(Paragraph::new(footer(top)), foot);
}

fn draw_table(frame: &mut Frame<'_>, area: Rect, top: &mut Top) {
    let shown = top.shown();
    top.room = usize::from(area.height.saturating_sub(1));
    top.first = top.first.min(shown.len().saturating_sub(top.room));
    let is_sorted_by = |nth: usize| SortKey::ALL[nth] == top.sort;
    let header = |nth: usize, name: &str| {
        let style = if is_sorted_by(nth) {
            Style::new().add_modifier(Modifier::REVERSED | Modifier::BOLD)
        } else {
            Style::new().bold()
        };
        let line = Line::from(name.to_owned()).style(style);
        Cell::from(if nth == 0 { line } else { line.right_aligned() })
    };
    let columns = fitting(area.width);
    let names = columns.iter().map(|(name, _)| *name);
    let names = ["NAME"].into_iter().chain(names);
    let header = Row::new(names.enumerate().map(|(nth, name)| header(nth, name)));
    let row = |rate: &Rate| {
        let cells = cells(rate).into_iter().take(columns.len());
        let cells = cells.map(|cell| Cell::from(Line::from(cell).right_aligned()));
        let name = Cell::from(rate.name.clone());
        let style = if rate.failed || rate.errors > 0 {
            Style::new().red().bold()
        } else if rate.throttled_percent > 0 {
            Style::new().yellow()
        } else if rate.iops == 0 && rate.in_flight == 0 {
            Style::new().dim()
        } else {
            Style::new()
        };
        Row::new([name].into_iter().chain(cells)).style(style)
    };
    let rows = shown.iter().skip(top.first).take(top.room).map(row);
    let widths = columns.iter().map(|(_, width)| Constraint::Length(*width));
    let widths = [Constraint::Min(0)].into_iter().chain(widths);
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

/// The columns that fit beside a name.
fn fitting(width: u16) -> &'static [(&'static str, u16)] {
    let mut left = width.saturating_sub(LEAST_NAME);
    let fits = |(_, width): &&(&str, u16)| {
        let rest = left.checked_sub(width + 1);
        left = rest.unwrap_or(0);
        rest.is_some()
    };
    let count = COLUMNS.iter().take_while(fits).count();
    &COLUMNS[..count]
}

fn footer(top: &Top) -> Line<'static> {
    if top.is_typing {
        return Line::from(format!(
            "filter: {}_   Enter keeps it, Esc ends it",
            top.filter
        ));
    }
    let mut line =
        Line::from("q quit  ←→ sort  r reverse  ↑↓ scroll  / filter  b busy  p pause").dim();
    let mut say = |text: String| line.push_span(Span::from(text).cyan().not_dim());
    if !top.filter.is_empty() {
        say(format!("  [{}]", top.filter));
    }
    if top.only_busy {
        say("  [busy]".to_owned());
    }
    if top.is_paused {
        say("  [paused]".to_owned());
    }
    line
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
    use serde_json::json;

    use super::super::rates::Sample;
    use super::super::state::Wish;
    use super::*;
    use crate::stats::DiskStats;

    fn disk(nth: u64, reads: u64) -> DiskStats {
        serde_json::from_value(json!({
            "name": format!("vm{nth}"), "size_bytes": 20_u64 << 30, "block_bytes": 1 << 20, "allocated_blocks": nth,
            "read": {"requests": reads, "errors": 0, "bytes": reads * 4096, "latency_us": reads,
                     "latencies": [{"at_most_us": 96, "requests": reads}]},
        }))
        .unwrap()
    }

    /// A fleet of which the first `busy` read `nth` thousand times a second.
    fn top_of(count: u64, busy: u64) -> Top {
        let mut top = Top::new("/run/control".into(), SortKey::Iops, None);
        let then = Instant::now();
        for (second, taken) in [then, then + Duration::from_secs(1)]
            .into_iter()
            .enumerate()
        {
            let reads = |nth| {
                if nth < busy {
                    second as u64 * nth * 1000
                } else {
                    0
                }
            };
            let disks = (0..count).map(|nth| disk(nth, reads(nth))).collect();
            top.take(Ok(Sample { taken, disks }));
        }
        top
    }

    fn screen(top: &mut Top, (width, height): (u16, u16)) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, top)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| {
            (0..width)
                .map(|x| buffer[(x, y)].symbol())
                .collect::<String>()
        };
        (0..height).map(|y| line(y).trim_end().to_owned()).collect()
    }

    fn press(top: &mut Top, code: KeyCode) -> Wish {
        top.press(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn a_thousand_disks_fit_a_terminal_of_80_by_24_the_busiest_first() {
        let mut top = top_of(1000, 4);
        let lines = screen(&mut top, (80, 24));
        assert_eq!(
            lines[1],
            "1000 disks, 3 busy: 6000 IOPS, read 23.4 MiB/s, write 0 B/s, 0 in flight"
        );
        let header: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(
            header,
            [
                "NAME", "IOPS", "READ/s", "WRITE/s", "P50", "P99", "QUEUE", "ALLOC", "HELD"
            ]
        );
        let row: Vec<&str> = lines[3].split_whitespace().collect();
        assert_eq!(
            row,
            [
                "vm3", "3000", "11.7", "MiB", "-", "96", "us", "96", "us", "-", "3", "MiB", "-"
            ]
        );
        assert!(lines[4].starts_with("vm2 "));
        assert!(lines[23].starts_with("q quit"), "{}", lines[23]);
        assert!(lines.iter().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn keys_sort_filter_scroll_and_end() {
        let mut top = top_of(1000, 4);
        for _ in 0..2 {
            press(&mut top, KeyCode::Left);
        }
        assert_eq!(top.sort, SortKey::Name);
        assert!(screen(&mut top, (80, 24))[3].starts_with("vm0 "));
        press(&mut top, KeyCode::End);
        assert!(screen(&mut top, (80, 24))[22].starts_with("vm999 "));
        press(&mut top, KeyCode::Char('/'));
        for letter in "99".chars() {
            press(&mut top, KeyCode::Char(letter));
        }
        assert!(screen(&mut top, (80, 24))[23].starts_with("filter: 99_"));
        press(&mut top, KeyCode::Enter);
        let lines = screen(&mut top, (80, 24));
        assert!(lines[3].starts_with("vm199 "), "{lines:?}");
        assert!(lines[23].ends_with("[99]"));
        press(&mut top, KeyCode::Esc);
        press(&mut top, KeyCode::Char('b'));
        assert_eq!(top.shown().len(), 3);
        assert_eq!(press(&mut top, KeyCode::Char('q')), Wish::End);
    }

    #[test]
    fn terminals_of_any_size_are_drawn_on_and_columns_that_do_not_fit_are_left_out() {
        let mut top = top_of(10, 4);
        let header = |lines: Vec<String>| {
            lines[2]
                .split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let narrow = header(screen(&mut top, (40, 10)));
        assert_eq!(narrow, ["NAME", "IOPS", "READ/s", "WRITE/s"]);
        assert_eq!(header(screen(&mut top, (80, 10))).len(), 9);
        for size in [(1, 1), (10, 3), (40, 5), (200, 60)] {
            screen(&mut top, size);
        }
    }

    #[test]
    fn that_the_daemon_is_gone_or_was_restarted_is_said() {
        let mut top = top_of(2, 2);
        top.take(Err("cannot speak to a daemon".to_owned()));
        let lines = screen(&mut top, (80, 24));
        assert_eq!(
            lines[1],
            "no answer, asking again: cannot speak to a daemon"
        );
        // What was known is still there.
        assert!(lines[3].starts_with("vm1 "));
        let taken = Instant::now() + Duration::from_secs(9);
        let disks = (0..2).map(|nth| disk(nth, 0)).collect();
        top.take(Ok(Sample { taken, disks }));
        assert_eq!(screen(&mut top, (80, 24))[1], "the daemon was restarted");
        top.take(Err("nobody is there".to_owned()));
        let disks = (0..2).map(|nth| disk(nth, 0)).collect();
        let taken = taken + Duration::from_secs(1);
        top.take(Ok(Sample { taken, disks }));
        assert_eq!(screen(&mut top, (80, 24))[1], "the daemon answers again");
        let taken = taken + Duration::from_secs(1);
        let disks = (0..2).map(|nth| disk(nth, 9)).collect();
        top.take(Ok(Sample { taken, disks }));
        let disks = (0..2).map(|nth| disk(nth, 0)).collect();
        top.take(Ok(Sample { taken, disks }));
        assert!(text(&top).contains("the daemon was restarted\n"));
    }
}

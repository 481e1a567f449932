//! The parts of an SVG picture: rectangles with tooltips, texts, axes, legends, and the colours.
//!
//! All text passes [`escape`], and all colours are classes, so that the picture is right on light
//! and on dark backgrounds. The images' colours are those of Okabe and Ito, which people with any colour vision
//! tell apart; the ramp for places gets steadily lighter.

use std::fmt::{Display, Write};
use std::ops::Range;

use crate::report::picture::{clipped, printable, thousandths};
use crate::size::Human;

/// How wide the picture is, and where its plots begin and end.
pub(super) const WIDTH: f64 = 1000.0;
pub(super) const LEFT: f64 = 30.0;
pub(super) const PLOT: f64 = 940.0;

/// The ramp for places on the disk, from its start to its end.
const RAMP: [[u8; 3]; 5] = [
    [0x5E, 0x3C, 0x99],
    [0x3A, 0x6F, 0xB8],
    [0x2A, 0x9D, 0xA8],
    [0x6C, 0xC0, 0x7A],
    [0xE6, 0xD8, 0x3E],
];

pub(super) const STYLE: &str = "\
text{font-family:system-ui,'Segoe UI','DejaVu Sans',sans-serif;font-size:12px;fill:#1f2328}
.b{font-weight:bold}.h{font-size:20px;font-weight:bold}.m{fill:#57606a}.e{text-anchor:end}.c{text-anchor:middle}
.bg{fill:#ffffff}.track{fill:#e9ecef}.axis{stroke:#8c959f;fill:none}
.i0{fill:#0072b2}.i1{fill:#e69f00}.i2{fill:#009e73}.i3{fill:#cc79a7}.i4{fill:#56b4e9}.i5{fill:#d55e00}
.hid{opacity:.35}.zero{fill:#8c959f}.meta{fill:#57606a}.link{opacity:.5}
rect,.link{shape-rendering:crispEdges}.link{shape-rendering:auto}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.m{fill:#9da7b3}.bg{fill:#0d1117}.track{fill:#262c34}
.axis{stroke:#6e7681}.i0{fill:#2b8fd0}.zero{fill:#8b949e}.meta{fill:#57606a}}
";

/// A document that grows downwards.
#[derive(Debug, Default)]
pub(super) struct Canvas {
    body: String,
    pub(super) y: f64,
}

impl Canvas {
    fn put(&mut self, part: impl Display) {
        writeln!(self.body, "{part}").expect("memory takes it");
    }

    /// The whole document.
    pub(super) fn finish(self, title: &str) -> String {
        let (height, ramp) = (Number(self.y), ramp_stops());
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
             width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
             <title>{}</title>\n<style>\n{STYLE}</style>\n\
             <defs><linearGradient id=\"ramp\">{ramp}</linearGradient></defs>\n\
             <rect class=\"bg\" width=\"{WIDTH}\" height=\"{height}\" rx=\"8\"/>\n{}</svg>\n",
            escape(title),
            self.body
        )
    }

    pub(super) fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let (x, y, text) = (Number(x), Number(y), escape(text));
        self.put(format_args!(
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{text}</text>"
        ));
    }

    /// A rectangle of a class.
    pub(super) fn rect(&mut self, class: &str, at: Area) {
        self.put(format_args!("<rect class=\"{class}\"{at}/>"));
    }

    /// A rectangle of another fill.
    pub(super) fn filled(&mut self, fill: &str, at: Area) {
        self.put(format_args!("<rect fill=\"{fill}\"{at}/>"));
    }

    /// Parts that have a tooltip together, of several lines.
    pub(super) fn with_tip(&mut self, tip: &str, draw: impl FnOnce(&mut Self)) {
        let lines: Vec<_> = tip.lines().map(escape).collect();
        self.put(format_args!("<g><title>{}</title>", lines.join("\n")));
        draw(self);
        self.put("</g>");
    }

    /// A band from a range of one line to a range of another one, as ranges of x.
    pub(super) fn link(&mut self, fill: &str, from: Range<f64>, to: Range<f64>, y: Range<f64>) {
        let [a, b, c, d] = [from.start, from.end, to.end, to.start].map(Number);
        let (top, bottom) = (Number(y.start), Number(y.end));
        self.put(format_args!(
            "<path class=\"link\" fill=\"{fill}\" d=\"M{a} {top}H{b}L{c} {bottom}H{d}Z\"/>"
        ));
    }

    /// An axis of bytes under `y`, with round numbers.
    pub(super) fn axis(&mut self, y: f64, len_bytes: u64, x_of: impl Fn(u64) -> f64) {
        let end = LEFT + PLOT;
        let baseline = y + 17.0;
        let mut ticks = vec![(end, len_bytes)];
        let mut at = 0;
        // A power of two, of which five to nine fit.
        let step = (len_bytes / 5).checked_ilog2().map(|power| 1_u64 << power);
        while let Some(step) = step.filter(|_| at < len_bytes) {
            let x = x_of(at);
            // The last one has the end's label.
            if end - x > 75.0 {
                ticks.push((x, at));
            }
            at = at.saturating_add(step);
        }
        for (x, at) in ticks {
            let (cx, top, bottom) = (Number(x), Number(y), Number(y + 5.0));
            self.put(format_args!(
                "<path class=\"axis\" d=\"M{cx} {top}V{bottom}\"/>"
            ));
            let class = match at {
                0 => "m",
                _ if at == len_bytes => "m e",
                _ => "m c",
            };
            self.text(x, baseline, class, &Human(at).to_string());
        }
    }

    /// What the colours mean, in as many rows as it takes.
    pub(super) fn legend(&mut self, entries: &[(Swatch<'_>, String)]) {
        let mut x = LEFT;
        for (swatch, name) in entries {
            let name = clipped(name, 48);
            let width = 42.0 + width_of(&name);
            if x > LEFT && x + width > LEFT + PLOT {
                x = LEFT;
                self.y += 20.0;
            }
            let at = Area {
                x,
                y: self.y - 10.0,
                width: 14.0,
                height: 12.0,
            };
            match swatch {
                Swatch::Class(class) => self.rect(class, at),
                Swatch::Ramp => self.filled("url(#ramp)", Area { width: 30.0, ..at }),
            }
            let skip = match swatch {
                Swatch::Class(_) => 20.0,
                Swatch::Ramp => 36.0,
            };
            self.text(x + skip, self.y, "", &name);
            x += width + skip - 20.0;
        }
    }
}

/// What stands in front of a legend's entry.
#[derive(Debug)]
pub(super) enum Swatch<'a> {
    Class(&'a str),
    Ramp,
}

/// Where a rectangle is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Area {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) width: f64,
    pub(super) height: f64,
}

impl Display for Area {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [x, y, width, height] = [self.x, self.y, self.width, self.height].map(Number);
        write!(
            f,
            " x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\""
        )
    }
}

/// A coordinate: a tenth of a pixel is enough.
struct Number(f64);

impl Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = format!("{:.1}", self.0);
        f.write_str(text.strip_suffix(".0").unwrap_or(&text))
    }
}

/// About how wide a text is, in fonts that may be wider than the author's.
fn width_of(text: &str) -> f64 {
    let width = |c: char| if c.is_ascii() { 7.2 } else { 12.5 };
    text.chars().map(width).sum()
}

/// The colour of the place `at` on a disk of `len`.
pub(super) fn ramp(at: u64, len: u64) -> String {
    let place = thousandths(at, len);
    let below = (place / 250).min(RAMP.len() - 2);
    let part = place - below * 250;
    let mut colour = String::from("#");
    for (&from, &to) in RAMP[below].iter().zip(&RAMP[below + 1]) {
        let mixed = usize::from(from) * (250 - part) + usize::from(to) * part;
        write!(colour, "{:02x}", (mixed + 125) / 250).expect("memory takes it");
    }
    colour
}

fn ramp_stops() -> String {
    let stop = |nth: u64| {
        let (percent, colour) = (nth * 25, ramp(nth, 4));
        format!("<stop offset=\"{percent}%\" stop-color=\"{colour}\"/>")
    };
    (0..=4).map(stop).collect()
}

/// A text as XML has it.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in printable(text).chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_a_text_stays_text() {
        assert_eq!(
            escape("</title><script a='\"&amp;\u{0}"),
            "&lt;/title&gt;&lt;script a=&#39;&quot;&amp;amp;\\u{0}"
        );
    }

    #[test]
    fn the_ramp_goes_through_its_stops_and_ends_with_them() {
        assert_eq!(ramp(0, 8), "#5e3c99");
        assert_eq!([ramp(4, 8), ramp(1, 8)], ["#2a9da8", "#4c56a9"]);
        assert_eq!([ramp(8, 8), ramp(9, 8)], ["#e6d83e", "#e6d83e"]);
        assert_eq!(ramp(u64::MAX / 2, u64::MAX), "#2a9da8");
    }
}

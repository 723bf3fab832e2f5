//! Scales, axes and frames of charts.

use std::fmt::{Display, Write};

pub(super) const WIDTH: f64 = 820.0;
const LEFT: f64 = 96.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 46.0;
/// Colours that there are.
pub(super) const COLOURS: usize = 8;

/// Text as XML has it: characters that it cannot have are replaced.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A table; columns in `numbers` are aligned as such.
pub(super) fn table(
    head: &[&str],
    numbers: &[usize],
    rows: impl Iterator<Item = Vec<String>>,
) -> String {
    let class = |column: usize| {
        if numbers.contains(&column) {
            " class=\"n\""
        } else {
            ""
        }
    };
    let mut out = String::from("<div class=\"wide\"><table><thead><tr>");
    for (column, name) in head.iter().enumerate() {
        let _ = write!(
            out,
            "<th scope=\"col\"{}>{}</th>",
            class(column),
            escaped(name)
        );
    }
    out.push_str("</tr></thead><tbody>\n");
    for row in rows {
        out.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let _ = write!(out, "<td{}>{}</td>", class(column), escaped(cell));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
    out
}

/// From values to places.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    is_log: bool,
    start: f64,
    length: f64,
}

impl Scale {
    pub(super) fn at(&self, value: f64) -> f64 {
        let share = match self.is_log {
            true => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.start + self.length * share.clamp(0.0, 1.0)
    }
}

/// Values with what stands beside them on an axis, ascending.
pub(super) type Ticks = Vec<(f64, String)>;

/// About five round values up to `high`.
pub(super) fn ticks(high: f64) -> Ticks {
    let step = round_step(high / 5.0);
    let digits = if step < 1.0 {
        (-step.log10()).ceil() as usize
    } else {
        0
    };
    let mut ticks = Ticks::new();
    for n in 0..=12 {
        let value = f64::from(n) * step;
        if value > high * 1.0001 {
            break;
        }
        ticks.push((value, short(value, digits)));
    }
    ticks
}

/// A round value above `high`.
pub(super) fn ceiling(high: f64) -> f64 {
    let step = round_step(high / 5.0);
    (high / step).ceil() * step
}

fn round_step(least: f64) -> f64 {
    let least = least.max(1e-9);
    let power = 10f64.powf(least.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|f| f * power >= least * 0.9999);
    factor.unwrap_or(10.0) * power
}

/// Large numbers with a letter.
fn short(value: f64, digits: usize) -> String {
    let letters = [
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ];
    match letters
        .into_iter()
        .find(|(scale, _)| value >= *scale * 10.0)
    {
        Some((scale, letter)) => {
            let text = format!("{:.1}", value / scale);
            format!("{}{letter}", text.trim_end_matches(".0"))
        }
        None => format!("{value:.digits$}"),
    }
}

/// Ticks for times up to `high` nanoseconds, and the unit that they are in.
pub(super) fn time_ticks(high: f64) -> (Ticks, &'static str) {
    const UNITS: [(f64, &str); 7] = [
        (365.25 * 86_400e9, "years"),
        (86_400e9, "days"),
        (3_600e9, "hours"),
        (60e9, "minutes"),
        (1e9, "seconds"),
        (1e6, "ms"),
        (1e3, "µs"),
    ];
    let unit = UNITS.into_iter().find(|(scale, _)| high >= 2.0 * scale);
    let (scale, unit) = unit.unwrap_or((1.0, "ns"));
    let ticks = ticks(high / scale).into_iter();
    (
        ticks.map(|(value, text)| (value * scale, text)).collect(),
        unit,
    )
}

/// A chart that is being drawn.
pub(super) struct Chart {
    pub(super) x: Scale,
    pub(super) y: Scale,
    height: f64,
    body: String,
}

impl Chart {
    /// With axes: `x` from and to, with ticks and what they are; the same for `y`.
    pub(super) fn new(
        plot_height: f64,
        (x_low, x_high, x_is_log): (f64, f64, bool),
        (x_ticks, x_label): (&Ticks, &str),
        y_high: f64,
        (y_ticks, y_label): (&Ticks, &str),
    ) -> Self {
        let x = Scale {
            low: x_low,
            high: x_high.max(x_low + 1.0),
            is_log: x_is_log,
            start: LEFT,
            length: WIDTH - LEFT - RIGHT,
        };
        let y = Scale {
            low: 0.0,
            high: y_high.max(1e-9),
            is_log: false,
            start: TOP + plot_height,
            length: -plot_height,
        };
        let mut chart = Self {
            x,
            y,
            height: TOP + plot_height + BOTTOM,
            body: String::new(),
        };
        let (right, bottom) = (WIDTH - RIGHT, TOP + plot_height);
        for (value, text) in y_ticks {
            let at = y.at(*value);
            chart.add(format_args!(
                "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/>"
            ));
            chart.add(format_args!(
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 7.0,
                at + 4.0,
                escaped(text)
            ));
        }
        for (value, text) in x_ticks {
            let at = x.at(*value);
            chart.add(format_args!(
                "<path class=\"grid\" d=\"M{at:.1} {TOP}V{bottom:.1}\"/>"
            ));
            chart.add(format_args!(
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                escaped(text)
            ));
        }
        chart.add(format_args!(
            "<path class=\"edge\" d=\"M{LEFT} {bottom:.1}H{right}\"/>"
        ));
        let middle = (LEFT + right) / 2.0;
        chart.add(format_args!(
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 36.0,
            escaped(x_label)
        ));
        let middle = TOP + plot_height / 2.0;
        chart.add(format_args!(
            "<text transform=\"translate(14 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escaped(y_label)
        ));
        chart
    }

    /// Draws something.
    pub(super) fn add(&mut self, what: impl Display) {
        // A string takes whatever is written to it.
        let _ = writeln!(self.body, "{what}");
    }

    /// A line through these values.
    pub(super) fn line(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>) {
        let mut d = String::new();
        for (n, (x, y)) in points.enumerate() {
            let letter = if n == 0 { 'M' } else { 'L' };
            let _ = write!(d, "{letter}{:.1} {:.1}", self.x.at(x), self.y.at(y));
        }
        if !d.is_empty() {
            self.add(format_args!("<path class=\"line {class}\" d=\"{d}\"/>"));
        }
    }

    /// A line that keeps each value until the next one.
    pub(super) fn steps(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>) {
        let mut d = String::new();
        for (n, (x, y)) in points.enumerate() {
            let (x, y) = (self.x.at(x), self.y.at(y));
            let _ = match n {
                0 => write!(d, "M{x:.1} {y:.1}"),
                _ => write!(d, "H{x:.1}V{y:.1}"),
            };
        }
        if !d.is_empty() {
            self.add(format_args!("<path class=\"line {class}\" d=\"{d}\"/>"));
        }
    }

    /// The whole of it, as an image with a title and a description.
    pub(super) fn svg(self, id: &str, title: &str, description: &str) -> String {
        format!(
            "<svg viewBox=\"0 0 {WIDTH} {:.0}\" role=\"img\" aria-labelledby=\"{id}-title {id}-desc\">\n<title id=\"{id}-title\">{}</title>\n\
             <desc id=\"{id}-desc\">{}</desc>\n{}</svg>\n",
            self.height,
            escaped(title),
            escaped(description),
            self.body
        )
    }
}

/// A chart with its title, legend (class of a line, words) and numbers.
pub(super) fn figure(
    chart: Chart,
    (id, title, description): (&str, &str, &str),
    legend: &[(String, String)],
    numbers: &str,
) -> String {
    let mut out = format!("<figure>\n<figcaption>{}</figcaption>\n", escaped(title));
    let _ = writeln!(out, "<p class=\"dim\">{}</p>", escaped(description));
    out.push_str(&chart.svg(id, title, description));
    if !legend.is_empty() {
        out.push_str("<ul class=\"legend\">");
        for (class, words) in legend {
            let _ = write!(
                out,
                "<li><svg viewBox=\"0 0 26 12\" aria-hidden=\"true\"><path class=\"{class}\" d=\"M1 6H25\"/></svg>{}</li>",
                escaped(words)
            );
        }
        out.push_str("</ul>\n");
    }
    let _ = writeln!(
        out,
        "<details><summary>The numbers: {}</summary>\n{numbers}</details>\n</figure>",
        escaped(title)
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        for high in [0.0, 1e-7, 0.3, 1.0, 7.0, 99.9, 1234.5, 8e18] {
            let ticks = ticks(high);
            assert!((1..=7).contains(&ticks.len()), "{high}: {ticks:?}");
            let mut texts: Vec<&String> = ticks.iter().map(|(_, text)| text).collect();
            texts.dedup();
            assert_eq!(texts.len(), ticks.len(), "{high}: {ticks:?}");
            assert!(ceiling(high) >= high);
        }
        assert_eq!(time_ticks(21.0e9).1, "seconds");
    }

    #[test]
    fn any_text_becomes_xml() {
        assert_eq!(
            escaped("<a b=\"&\">\u{1}"),
            "&lt;a b=&quot;&amp;&quot;&gt;\u{fffd}"
        );
    }
}

//! Plots as SVG files. Draws what it is given; decides nothing about it.

use std::ops::Range;
use std::path::Path;

use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

/// Lines over two axes.
pub(crate) struct Plot<'a> {
    pub(crate) title: &'a str,
    pub(crate) x: Axis<'a>,
    pub(crate) y: Axis<'a>,
    pub(crate) lines: Vec<Line>,
}

/// One axis.
pub(crate) struct Axis<'a> {
    pub(crate) label: &'a str,
    pub(crate) logarithmic: bool,
}

/// One line: its name and its points.
pub(crate) type Line = (String, Vec<(f64, f64)>);

const SIZE: (u32, u32) = (820, 440);
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0xd6, 0x27, 0x28),
    RGBColor(0x7f, 0x7f, 0x7f),
    RGBColor(0x2c, 0xa0, 0x2c),
    RGBColor(0x94, 0x67, 0xbd),
    RGBColor(0xff, 0x7f, 0x0e),
];

impl Plot<'_> {
    /// Draws into a file.
    pub(crate) fn draw(&self, file: &Path) {
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let x = range(points().map(|point| point.0), self.x.logarithmic);
        let y = range(points().map(|point| point.1), self.y.logarithmic);
        match (self.x.logarithmic, self.y.logarithmic) {
            (false, false) => self.on(file, x, y),
            (true, false) => self.on(file, x.log_scale(), y),
            (false, true) => self.on(file, x, y.log_scale()),
            (true, true) => self.on(file, x.log_scale(), y.log_scale()),
        }
    }

    fn on<X, Y>(&self, file: &Path, x: X, y: Y)
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let root = SVGBackend::new(file, SIZE).into_drawing_area();
        root.fill(&WHITE).unwrap();
        let mut chart = ChartBuilder::on(&root)
            .caption(self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(76)
            .build_cartesian_2d(x, y)
            .unwrap();
        chart
            .configure_mesh()
            .x_desc(self.x.label)
            .y_desc(self.y.label)
            .x_labels(6)
            .y_labels(8)
            .x_label_formatter(&number)
            .y_label_formatter(&number)
            .light_line_style(RGBColor(0xf2, 0xf2, 0xf2))
            .draw()
            .unwrap();
        for ((name, points), colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
            let style = colour.stroke_width(2);
            let line = chart.draw_series(LineSeries::new(points.iter().copied(), style)).unwrap();
            line.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            // Most lines rise: the upper left is free.
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(0xcc, 0xcc, 0xcc))
            .draw()
            .unwrap();
        root.present().unwrap();
    }
}

/// From the least to the greatest value, with some room; from zero where the axis is not
/// logarithmic.
fn range(values: impl Iterator<Item = f64>, logarithmic: bool) -> Range<f64> {
    let (least, greatest) =
        values.fold((f64::MAX, f64::MIN), |(least, greatest), value| (least.min(value), greatest.max(value)));
    if logarithmic { (least * 0.8).max(1e-6)..(greatest * 1.25).max(2e-6) } else { 0.0..(greatest * 1.05).max(1e-6) }
}

fn number(value: &f64) -> String {
    let (value, unit) = match *value {
        value if value >= 1e6 => (value / 1e6, " M"),
        value if value >= 1e4 => (value / 1e3, " k"),
        value => (value, ""),
    };
    let digits = crate::measure::short(value);
    let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { &digits };
    format!("{digits}{unit}")
}

//! Numbers for Prometheus: each program has one table of what it exports, and a registry that is made of it.

use std::collections::BTreeMap;

use prometheus::{CounterVec, Encoder as _, GaugeVec, HistogramOpts, HistogramVec, Opts, Registry, TextEncoder};

/// What [`Metrics::render`] is served as.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// One name that is exported.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    /// Begins with `espalier_` and ends with the unit; counters end with `_total`.
    pub name: &'static str,
    /// One sentence for people.
    pub help: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Names of its labels, each with a handful of values.
    pub labels: &'static [&'static str],
}

/// What a family is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only grows while the process lives.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations up to each of these bounds.
    Histogram(&'static [f64]),
}

impl Family {
    /// A counter.
    pub const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, help, kind: Kind::Counter, labels }
    }

    /// A gauge.
    pub const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, help, kind: Kind::Gauge, labels }
    }
}

/// Bounds, in seconds, for what takes from a tenth of a second to an hour.
pub const SECONDS: &[f64] = &[0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
/// Bounds, in seconds, for what takes milliseconds.
pub const MILLISECONDS: &[f64] = &[0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0];

/// A program's table: a constant for each family, and `FAMILIES` with all of them.
#[macro_export]
macro_rules! families {
    ($($name:ident = $family:expr;)*) => {
        $(const $name: $crate::metric::Family = $family;)*

        /// All of them.
        pub const FAMILIES: &[$crate::metric::Family] = &[$($name),*];
    };
}

enum Collector {
    Counter(CounterVec),
    Gauge(GaugeVec),
    Histogram(HistogramVec),
}

/// The numbers of one process.
pub struct Metrics {
    registry: Registry,
    collectors: BTreeMap<&'static str, Collector>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Metrics").field("families", &self.collectors.len()).finish_non_exhaustive()
    }
}

const TABLE: &str = "a family is used as the table says: in it, of its kind, with its labels";

impl Metrics {
    /// A registry of what is in `table`.
    ///
    /// # Panics
    /// If a name or label of the table is not one that Prometheus takes, or stands twice.
    pub fn new(table: &[Family]) -> Self {
        let registry = Registry::new();
        let mut collectors = BTreeMap::new();
        for family in table {
            let options = Opts::new(family.name, family.help);
            let collector = match family.kind {
                Kind::Counter => {
                    let counter = CounterVec::new(options, family.labels).expect(TABLE);
                    registry.register(Box::new(counter.clone())).expect(TABLE);
                    Collector::Counter(counter)
                }
                Kind::Gauge => {
                    let gauge = GaugeVec::new(options, family.labels).expect(TABLE);
                    registry.register(Box::new(gauge.clone())).expect(TABLE);
                    Collector::Gauge(gauge)
                }
                Kind::Histogram(bounds) => {
                    let options = HistogramOpts::from(options).buckets(bounds.to_vec());
                    let histogram = HistogramVec::new(options, family.labels).expect(TABLE);
                    registry.register(Box::new(histogram.clone())).expect(TABLE);
                    Collector::Histogram(histogram)
                }
            };
            collectors.insert(family.name, collector);
        }
        Self { registry, collectors }
    }

    fn collector(&self, family: &Family) -> &Collector {
        self.collectors.get(family.name).expect(TABLE)
    }

    /// Adds to a counter; adding 0 makes it appear.
    ///
    /// # Panics
    /// If the family is no counter of the table.
    pub fn add(&self, family: &Family, labels: &[&str], by: f64) {
        let Collector::Counter(counter) = self.collector(family) else { unreachable!("{TABLE}: {}", family.name) };
        counter.with_label_values(labels).inc_by(by.max(0.0));
    }

    /// Brings a counter up to a total that is kept elsewhere.
    ///
    /// # Panics
    /// If the family is no counter of the table.
    pub fn raise(&self, family: &Family, labels: &[&str], total: f64) {
        let Collector::Counter(counter) = self.collector(family) else { unreachable!("{TABLE}: {}", family.name) };
        let counter = counter.with_label_values(labels);
        counter.inc_by((total - counter.get()).max(0.0));
    }

    /// Sets a gauge.
    ///
    /// # Panics
    /// If the family is no gauge of the table.
    pub fn set(&self, family: &Family, labels: &[&str], value: f64) {
        let Collector::Gauge(gauge) = self.collector(family) else { unreachable!("{TABLE}: {}", family.name) };
        gauge.with_label_values(labels).set(value);
    }

    /// Counts an observation in a histogram.
    ///
    /// # Panics
    /// If the family is no histogram of the table.
    pub fn observe(&self, family: &Family, labels: &[&str], value: f64) {
        let Collector::Histogram(histogram) = self.collector(family) else { unreachable!("{TABLE}: {}", family.name) };
        histogram.with_label_values(labels).observe(value);
    }

    /// Drops all values of a gauge: what it told of is gone.
    ///
    /// # Panics
    /// If the family is no gauge of the table.
    pub fn clear(&self, family: &Family) {
        let Collector::Gauge(gauge) = self.collector(family) else { unreachable!("{TABLE}: {}", family.name) };
        gauge.reset();
    }

    /// Everything, in Prometheus' text format 0.0.4.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Writing to memory does not fail, and families without values are not gathered.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DONE: Family = Family { name: "espalier_done_total", help: "Done.", kind: Kind::Counter, labels: &["what"] };
    const HELD: Family = Family { name: "espalier_held_bytes", help: "Held.", kind: Kind::Gauge, labels: &["where"] };
    const TOOK: Family =
        Family { name: "espalier_took_seconds", help: "Took.", kind: Kind::Histogram(&[0.1, 1.0]), labels: &[] };

    #[test]
    fn values_are_rendered_under_their_names_and_labels() {
        let metrics = Metrics::new(&[DONE, HELD, TOOK]);
        metrics.add(&DONE, &["layer"], 2.0);
        metrics.raise(&DONE, &["layer"], 5.0);
        metrics.raise(&DONE, &["layer"], 4.0);
        metrics.set(&HELD, &["disk \"x\"\n"], 7.5);
        metrics.observe(&TOOK, &[], 0.5);
        let text = metrics.render();
        for line in [
            "# TYPE espalier_done_total counter",
            "espalier_done_total{what=\"layer\"} 5",
            "espalier_held_bytes{where=\"disk \\\"x\\\"\\n\"} 7.5",
            "espalier_took_seconds_bucket{le=\"0.1\"} 0",
            "espalier_took_seconds_bucket{le=\"1\"} 1",
            "espalier_took_seconds_count 1",
        ] {
            assert!(text.lines().any(|found| found == line), "`{line}` is not in\n{text}");
        }
        metrics.clear(&HELD);
        assert!(!metrics.render().contains("espalier_held_bytes"));
    }
}

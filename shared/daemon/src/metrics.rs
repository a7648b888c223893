//! Metrics written from a snapshot at each scrape: nothing to keep up to date between scrapes.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use shared::histogram::Histogram;

/// One value and the labels that tell it from its siblings. Labels have few values: never one per client or topic name
/// of a device.
pub type Labelled<'a, T> = (Vec<(&'static str, &'a str)>, T);

/// Writes metrics of one scrape.
#[derive(Debug)]
pub struct Metrics<'a>(DescriptorEncoder<'a>);

impl<'a> Metrics<'a> {
    /// Over what the registry hands a collector.
    pub fn new(encoder: DescriptorEncoder<'a>) -> Self {
        Self(encoder)
    }

    /// A value that goes up and down.
    pub fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        gauge.encode(self.0.encode_descriptor(name, help, None, gauge.metric_type())?)
    }

    /// One value per label set.
    pub fn gauges<'l>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = Labelled<'l, f64>>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, ConstGauge::new(0f64).metric_type())?;
        for (labels, value) in values {
            ConstGauge::new(value).encode(labelled(&mut family, &labels)?)?;
        }
        Ok(())
    }

    /// How values were spread, as counted since the start.
    pub fn histogram(&mut self, name: &str, help: &str, values: &Histogram) -> fmt::Result {
        encode_histogram(self.0.encode_descriptor(name, help, None, MetricType::Histogram)?, values)
    }

    /// One spread per label set.
    pub fn histograms<'l, 'h>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = Labelled<'l, &'h Histogram>>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, values) in values {
            encode_histogram(labelled(&mut family, &labels)?, values)?;
        }
        Ok(())
    }

    /// A count since the start. `name` is given without `_total`, which the text format adds.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let counter = ConstCounter::new(value);
        counter.encode(self.0.encode_descriptor(name, help, None, counter.metric_type())?)
    }

    /// One count per label set.
    pub fn counters<'l>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = Labelled<'l, u64>>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, ConstCounter::new(0u64).metric_type())?;
        for (labels, value) in values {
            ConstCounter::new(value).encode(labelled(&mut family, &labels)?)?;
        }
        Ok(())
    }
}

fn encode_histogram(mut encoder: MetricEncoder<'_>, values: &Histogram) -> fmt::Result {
    let bounds = values.bounds.iter().copied().chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(values.counts.iter().copied()).collect();
    encoder.encode_histogram::<NoLabelSet>(values.sum, values.count(), &buckets, None)
}

fn labelled<'e>(
    family: &'e mut MetricEncoder<'_>,
    labels: &'e Vec<(&'static str, &str)>,
) -> Result<MetricEncoder<'e>, fmt::Error> {
    family.encode_family(labels)
}

#[cfg(test)]
mod tests {
    use prometheus_client::collector::Collector;
    use prometheus_client::registry::Registry;

    use super::*;

    #[derive(Debug)]
    struct Two;

    impl Collector for Two {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
            let mut metrics = Metrics::new(encoder);
            metrics.gauge("a_ratio", "A", 0.5)?;
            metrics.gauges("b_bytes", "B", [(vec![("stream", "x")], 1.0), (vec![("stream", "y")], 2.0)])?;
            let mut values = Histogram::new(&[1.0, 10.0]);
            [0.5, 5.0, 50.0].into_iter().for_each(|value| values.add(value));
            metrics.histogram("h_seconds", "H", &values)?;
            metrics.histograms("i_seconds", "I", [(vec![("shard", "1")], &values)])?;
            metrics.counter("c", "C", 7)
        }
    }

    #[test]
    fn each_metric_has_its_type_labels_and_value() {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Two));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "# TYPE a_ratio gauge",
            "a_ratio 0.5",
            "b_bytes{stream=\"y\"} 2.0",
            "c_total 7",
            "h_seconds_bucket{le=\"10.0\"} 2",
            "h_seconds_bucket{le=\"+Inf\"} 3",
            "h_seconds_count 3",
            "i_seconds_count{shard=\"1\"} 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} not in\n{text}");
        }
    }
}

//! What was chosen of what the kernel can do, as labels of an info metric.

use std::fmt;
use std::sync::{Arc, OnceLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::info::Info;

type Features = Vec<(&'static str, String)>;

/// Empty in a mode that has no choice; clones share the content.
#[derive(Debug, Clone, Default)]
pub(super) struct FeaturesCollector(Arc<OnceLock<Features>>);

impl FeaturesCollector {
    /// The first stay: a process chooses once.
    pub(super) fn set(&self, features: Features) {
        let _ = self.0.set(features);
    }
}

impl Collector for FeaturesCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(features) = self.0.get().filter(|features| !features.is_empty()) else {
            return Ok(());
        };
        let metric = Info::new(features.clone());
        let help = "What ebpf mode chose of what the kernel can do";
        metric.encode(encoder.encode_descriptor("ebpf", help, None, metric.metric_type())?)
    }
}

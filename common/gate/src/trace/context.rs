//! Names of traces and spans, and how they travel with a call: W3C's `traceparent`.

use std::fmt;

use sha2::{Digest as _, Sha256};
use tonic::metadata::{MetadataMap, MetadataValue};

/// The key under which a context travels.
const KEY: &str = "traceparent";

/// Which span of which trace something belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: TraceId,
    /// The span.
    pub span: SpanId,
}

/// Names a trace; never zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceId([u8; 16]);

/// Names a span of a trace; never zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SpanId([u8; 8]);

impl TraceId {
    /// The trace of what is named so: the same name is the same trace, in whatever process.
    pub fn of(name: &str) -> Self {
        let digest: [u8; 32] = Sha256::digest(name.as_bytes()).into();
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        // Zero names nothing; a digest is it never, but whoever reads this need not believe so.
        id[15] |= u8::from(id == [0; 16]);
        Self(id)
    }

    /// One of what has no name.
    pub fn random() -> Self {
        Self(rand::random_range(1..=u128::MAX).to_be_bytes())
    }

    /// As it goes into a message.
    pub fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl SpanId {
    /// A new one.
    pub fn random() -> Self {
        Self(rand::random_range(1..=u64::MAX).to_be_bytes())
    }

    /// As it goes into a message.
    pub fn bytes(self) -> [u8; 8] {
        self.0
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl Context {
    /// As a header says it: version, trace, span, and that it is recorded.
    pub fn traceparent(self) -> String {
        format!("00-{:?}-{:?}-01", self.trace, self.span)
    }

    /// Reads a header. Nothing if it is not one, or says that the trace is not recorded: a trace that cannot be read is never
    /// a reason to refuse a call.
    pub fn parse(header: &str) -> Option<Self> {
        let (version, rest) = (header.get(..2)?, header.get(2..55)?);
        let is_lower_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let more = header.get(55..)?;
        // Version 0 ends here; later ones may say more behind another dash.
        if !is_lower_hex(version) || version == "ff" || !(more.is_empty() || (version != "00" && more.starts_with('-')))
        {
            return None;
        }
        let [nothing, trace, span, flags] = rest.split('-').collect::<Vec<_>>().try_into().ok()?;
        if !nothing.is_empty() || (trace.len(), span.len(), flags.len()) != (32, 16, 2) {
            return None;
        }
        if ![trace, span, flags].into_iter().all(is_lower_hex) {
            return None;
        }
        let trace: [u8; 16] = hex::decode(trace).ok()?.try_into().ok()?;
        let span: [u8; 8] = hex::decode(span).ok()?.try_into().ok()?;
        let is_recorded = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        (is_recorded && trace != [0; 16] && span != [0; 8])
            .then_some(Self { trace: TraceId(trace), span: SpanId(span) })
    }

    /// What the metadata of a call says.
    pub fn of_call(metadata: &MetadataMap) -> Option<Self> {
        Self::parse(metadata.get(KEY)?.to_str().ok()?)
    }

    /// Sends a context along with a call, if there is one.
    pub fn send_along<T>(context: Option<Self>, request: &mut tonic::Request<T>) {
        let value = context.and_then(|context| MetadataValue::try_from(context.traceparent()).ok());
        if let Some(value) = value {
            request.metadata_mut().insert(KEY, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_is_said_is_read_again() {
        let context = Context::parse(EXAMPLE).unwrap();
        assert_eq!(context.traceparent(), EXAMPLE);
        let mut request = tonic::Request::new(());
        assert_eq!(Context::of_call(request.metadata()), None);
        Context::send_along(Some(context), &mut request);
        assert_eq!(Context::of_call(request.metadata()), Some(context));
        let own = Context { trace: TraceId::of("run 1"), span: SpanId::random() };
        assert_eq!(Context::parse(&own.traceparent()), Some(own));
        assert_eq!(TraceId::of("run 1"), own.trace);
        assert_ne!(TraceId::of("run 2"), own.trace);
    }

    #[test]
    fn a_later_version_may_say_more() {
        let later = EXAMPLE.replacen("00", "cc", 1);
        assert!(Context::parse(&later).is_some());
        assert!(Context::parse(&format!("{later}-what-comes")).is_some());
        assert!(Context::parse(&format!("{later}.what")).is_none());
    }

    #[test]
    fn anything_else_is_no_context() {
        let zero_trace = format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32));
        let zero_span = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{}-01", "0".repeat(16));
        let upper = EXAMPLE.to_uppercase();
        let unrecorded = EXAMPLE.replace("-01", "-00");
        let longer = format!("{EXAMPLE}-more");
        let forbidden = EXAMPLE.replacen("00", "ff", 1);
        let shifted = EXAMPLE.replace("-00f0", "0-0f0");
        let others = ["", "00", "é0-4bf92f", &EXAMPLE[..54], "0é-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0"];
        for header in
            [&zero_trace[..], &zero_span, &upper, &unrecorded, &longer, &forbidden, &shifted].into_iter().chain(others)
        {
            assert_eq!(Context::parse(header), None, "{header}");
        }
    }
}

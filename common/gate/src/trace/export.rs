//! Sends spans to a collector, by OTLP over gRPC: in batches, each within a deadline, some times over if the collector is away for
//! a moment. Whatever goes wrong here is counted, and is nobody else's trouble.

use std::sync::atomic::Ordering;
use std::time::Duration;

use espalier_common::clock::Stopwatch;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{self as otlp, ResourceSpans, ScopeSpans, Status, span::SpanKind, status};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::{Inner, Side, Span, Value};
use crate::{Dialer, GateError};

/// Spans in one message.
const BATCH: usize = 512;
/// What a span waits for others to go with it.
const GATHERING: Duration = Duration::from_secs(1);
/// What a collector may take for a message.
const DEADLINE: Duration = Duration::from_secs(5);
/// Pauses before a message is sent again to a collector that is away.
const PAUSES: [Duration; 3] = [Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];
/// Seconds after which it is said again that spans are lost.
const SILENCE_SECONDS: f64 = 60.0;

/// Where spans are sent.
#[derive(Debug, Clone)]
pub struct Collector {
    endpoint: String,
    channel: Endpoint,
    dialer: Dialer,
}

impl Collector {
    /// The collector at a URL.
    ///
    /// # Errors
    /// `Url`, `PlainUrl`, `NoTls`.
    pub fn new(endpoint: &str, dialer: &Dialer) -> Result<Self, GateError> {
        if endpoint.split('/').nth(2).is_some_and(|authority| authority.contains('@')) {
            // Nor is it shown, in this message or any other.
            let reason =
                "a user or password in a URL is not kept secret: let a collector on loopback add it".to_owned();
            return Err(GateError::Url { url: "trace.endpoint".to_owned(), reason });
        }
        dialer.connector_to_collector(endpoint)?;
        let wrong =
            |error: tonic::transport::Error| GateError::Url { url: endpoint.to_owned(), reason: error.to_string() };
        let channel = Endpoint::from_shared(endpoint.to_owned()).map_err(wrong)?;
        let channel = channel.connect_timeout(DEADLINE).timeout(DEADLINE);
        Ok(Self { endpoint: endpoint.to_owned(), channel, dialer: dialer.clone() })
    }

    fn client(&self) -> Result<TraceServiceClient<Channel>, GateError> {
        let connector = self.dialer.connector_to_collector(&self.endpoint)?;
        Ok(TraceServiceClient::new(self.channel.connect_with_connector_lazy(connector)))
    }
}

/// In whose name spans are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// The program.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Which of several, if there are.
    pub instance: Option<String>,
}

impl Service {
    fn resource(&self) -> Resource {
        let text = |key, value: &str| pair(key, Value::Text(value.to_owned()));
        let instance = self.instance.as_deref().map(|instance| text("service.instance.id", instance));
        let attributes = [text("service.name", self.name), text("service.version", self.version)];
        Resource { attributes: attributes.into_iter().chain(instance).collect(), ..Resource::default() }
    }
}

fn pair(key: &str, value: Value) -> KeyValue {
    let value = match value {
        Value::Text(text) => any_value::Value::StringValue(text),
        Value::Number(number) => any_value::Value::IntValue(number),
    };
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn message(span: Span) -> otlp::Span {
    let kind = match span.side {
        Side::Within => SpanKind::Internal,
        Side::Caller => SpanKind::Client,
        Side::Called => SpanKind::Server,
    };
    let status = span.error.map(|message| Status { message, code: status::StatusCode::Error.into() });
    otlp::Span {
        trace_id: span.context.trace.bytes().to_vec(),
        span_id: span.context.span.bytes().to_vec(),
        parent_span_id: span.parent.map(|parent| parent.bytes().to_vec()).unwrap_or_default(),
        flags: 1,
        name: span.name.into_owned(),
        kind: kind.into(),
        start_time_unix_nano: span.start,
        end_time_unix_nano: span.end,
        attributes: span.attributes.into_iter().map(|(key, value)| pair(key, value)).collect(),
        status,
        ..otlp::Span::default()
    }
}

/// Sends what comes until `stop` is set, and then what is there already.
pub(super) async fn send(
    mut spans: mpsc::Receiver<Span>,
    collector: Collector,
    service: Service,
    counts: &Inner,
    stop: CancellationToken,
) {
    let client = match collector.client() {
        Ok(client) => client,
        // It was looked at when the collector was made.
        Err(error) => return tracing::warn!(%error, "spans are not sent"),
    };
    let mut sender = Sender { client, endpoint: collector.endpoint, resource: service.resource(), warned: None };
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            taken = spans.recv_many(&mut batch, BATCH) => if taken == 0 { return },
            () = stop.cancelled() => break,
        }
        let gathering = tokio::time::sleep(GATHERING);
        tokio::pin!(gathering);
        while batch.len() < BATCH {
            let room = BATCH - batch.len();
            tokio::select! {
                taken = spans.recv_many(&mut batch, room) => if taken == 0 { break },
                () = &mut gathering => break,
                () = stop.cancelled() => break,
            }
        }
        sender.deliver(batch, counts, &stop).await;
    }
    spans.close();
    let mut batch = Vec::new();
    while spans.recv_many(&mut batch, BATCH).await > 0 {
        sender.deliver(std::mem::take(&mut batch), counts, &stop).await;
    }
}

struct Sender {
    client: TraceServiceClient<Channel>,
    endpoint: String,
    resource: Resource,
    /// When it was last said that spans are lost.
    warned: Option<Stopwatch>,
}

impl Sender {
    /// Sends a batch, and counts what came of it. Once `stop` is set, it is tried once.
    async fn deliver(&mut self, batch: Vec<Span>, counts: &Inner, stop: &CancellationToken) {
        let count = batch.len() as u64;
        let scope = InstrumentationScope { name: "espalier".to_owned(), ..InstrumentationScope::default() };
        let spans = batch.into_iter().map(message).collect();
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() }];
        let resource_spans =
            vec![ResourceSpans { resource: Some(self.resource.clone()), scope_spans, ..ResourceSpans::default() }];
        let request = ExportTraceServiceRequest { resource_spans };
        let mut pauses = PAUSES.iter();
        let lost = loop {
            // The deadline of the channel is for the call; this one also bounds the way to it.
            let answer = tokio::time::timeout(DEADLINE, self.client.export(request.clone())).await;
            let status = match answer.unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded("no answer"))) {
                Ok(answer) => {
                    let refused = answer.into_inner().partial_success.unwrap_or_default();
                    let lost = u64::try_from(refused.rejected_spans).unwrap_or(0).min(count);
                    if lost > 0 {
                        self.warn(lost, &refused.error_message);
                    }
                    break lost;
                }
                Err(status) => status,
            };
            let pause = pauses.next().filter(|_| is_passing(status.code()) && !stop.is_cancelled());
            let Some(pause) = pause else {
                self.warn(count, &format!("{}: {}", status.code(), status.message()));
                break count;
            };
            tokio::select! {
                () = tokio::time::sleep(*pause) => {}
                () = stop.cancelled() => {}
            }
        };
        counts.lost.fetch_add(lost, Ordering::Relaxed);
        counts.sent.fetch_add(count - lost, Ordering::Relaxed);
    }

    fn warn(&mut self, lost: u64, reason: &str) {
        if self.warned.is_none_or(|warned| warned.seconds() > SILENCE_SECONDS) {
            tracing::warn!(collector = self.endpoint, lost, reason, "spans are lost");
            self.warned = Some(Stopwatch::start());
        }
    }
}

/// Whether the same message may be taken later, as OTLP has it.
fn is_passing(code: Code) -> bool {
    matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss
            | Code::ResourceExhausted
    )
}

#[cfg(test)]
mod tests {
    use super::super::{TraceId, Tracer};
    use super::*;

    fn service() -> Service {
        Service { name: "test", version: "0", instance: None }
    }

    #[test]
    fn a_url_with_a_password_is_refused_and_not_shown() {
        let error = Collector::new("http://bob:hunter2@127.0.0.1:1", &Dialer::default()).unwrap_err().to_string();
        assert!(error.contains("trace.endpoint") && !error.contains("hunter2"), "{error}");
    }

    /// It accepts, and says nothing.
    #[tokio::test]
    async fn nobody_waits_for_a_collector_that_is_silent() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (tracer, sending) = Tracer::start(Some(Collector::new(&url, &Dialer::default()).unwrap()), service());
        let watch = Stopwatch::start();
        for _ in 0..20_000 {
            drop(tracer.begin(TraceId::of("run"), "run").with("key", "value"));
        }
        assert!(watch.seconds() < 2.0, "{} s", watch.seconds());
        let (sent, lost) = tracer.counts();
        assert!(sent == 0 && lost >= 20_000 - 2 * 4096, "{sent} {lost}");
        let watch = Stopwatch::start();
        sending.finish().await;
        assert!(watch.seconds() < 5.0, "{} s", watch.seconds());
    }

    #[tokio::test]
    async fn what_nobody_takes_is_counted() {
        // A port that was free a moment ago.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let collector = Collector::new(&format!("http://{address}"), &Dialer::default()).unwrap();
        let (tracer, sending) = Tracer::start(Some(collector), service());
        drop(tracer.begin(TraceId::of("run"), "run"));
        sending.finish().await;
        assert_eq!(tracer.counts(), (0, 1));
    }
}

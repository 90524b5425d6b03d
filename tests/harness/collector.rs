//! A collector of traces that keeps what it is sent.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// A span, as it came.
#[derive(Debug, Clone)]
pub struct Span {
    /// The program, and which one of several.
    pub from: (String, String),
    /// Its trace.
    pub trace: Vec<u8>,
    /// Its own name in the trace.
    pub id: Vec<u8>,
    /// The span that it is a part of; empty for a root.
    pub parent: Vec<u8>,
    /// What was done.
    pub name: String,
    /// Nanoseconds since 1970.
    pub start: u64,
    /// Nanoseconds since 1970.
    pub end: u64,
    /// More about it, as text.
    pub attributes: BTreeMap<String, String>,
    /// Why it did not end well.
    pub error: Option<String>,
}

impl Span {
    /// An attribute; empty if it has none of that name.
    pub fn get(&self, key: &str) -> &str {
        self.attributes.get(key).map_or("", String::as_str)
    }
}

/// A collector on loopback, as long as the test's process lives.
#[derive(Debug)]
pub struct Collector {
    /// Where it is.
    pub url: String,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    /// Starts one.
    ///
    /// # Errors
    /// If nothing can be listened on.
    pub fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let url = format!("http://{}", listener.local_addr()?);
        let spans = Arc::new(Mutex::new(Vec::new()));
        let service = TraceServiceServer::new(Kept(Arc::clone(&spans)));
        let serve = move || {
            let served = Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener));
            // Whoever misses spans says so.
            let _ = runtime.block_on(served);
        };
        thread::Builder::new().name("collector".to_owned()).spawn(serve).context("no thread for a collector")?;
        Ok(Self { url, spans })
    }

    /// What came so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct Kept(Arc<Mutex<Vec<Span>>>);

fn texts(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |attribute: KeyValue| {
        let value = match attribute.value.and_then(|value| value.value) {
            Some(any_value::Value::StringValue(text)) => text,
            Some(any_value::Value::IntValue(number)) => number.to_string(),
            other => format!("{other:?}"),
        };
        (attribute.key, value)
    };
    attributes.into_iter().map(text).collect()
}

#[tonic::async_trait]
impl TraceService for Kept {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut came = Vec::new();
        for resource in request.into_inner().resource_spans {
            let of = texts(resource.resource.map(|resource| resource.attributes).unwrap_or_default());
            let word = |key: &str| of.get(key).cloned().unwrap_or_default();
            let from = (word("service.name"), word("service.instance.id"));
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let failed = span.status.filter(|status| status.code == i32::from(StatusCode::Error));
                came.push(Span {
                    from: from.clone(),
                    trace: span.trace_id,
                    id: span.span_id,
                    parent: span.parent_span_id,
                    name: span.name,
                    start: span.start_time_unix_nano,
                    end: span.end_time_unix_nano,
                    attributes: texts(span.attributes),
                    error: failed.map(|status| status.message),
                });
            }
        }
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(came);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

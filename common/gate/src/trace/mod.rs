//! Traces: what took how long, in which process, told to a collector by OTLP. A [`Tracer`] takes spans that have ended, and never
//! makes whoever ends one wait; a [`Scope`] is where new spans belong, and does nothing where nothing is traced.

mod context;
mod export;

use std::borrow::Cow;
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use espalier_common::clock::unix_nanos;
use espalier_common::tasks::TaskGroup;
use tokio::sync::mpsc;

pub use context::{Context, SpanId, TraceId};
pub use export::{Collector, Service};

/// Spans that wait to be sent; more are lost, and counted.
const QUEUE: usize = 4096;
/// What the last spans of a process may take to be sent, once it is told to end.
const FAREWELL: Duration = Duration::from_secs(2);

/// A value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Text.
    Text(String),
    /// A number.
    Number(i64),
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Self {
        Self::from(number as u64)
    }
}

/// On which side of a call a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// On none.
    Within,
    /// It waits for another process.
    Caller,
    /// It does what another process asked for.
    Called,
}

/// A span that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Its trace and its own name.
    pub context: Context,
    /// The span that it is a part of.
    pub parent: Option<SpanId>,
    /// What was done.
    pub name: Cow<'static, str>,
    /// On which side of a call.
    pub side: Side,
    /// Nanoseconds since 1970.
    pub start: u64,
    /// Nanoseconds since 1970.
    pub end: u64,
    /// More about it.
    pub attributes: Vec<(&'static str, Value)>,
    /// Why it did not end well, if it did not.
    pub error: Option<String>,
}

#[derive(Debug)]
struct Inner {
    queue: mpsc::Sender<Span>,
    sent: AtomicU64,
    lost: AtomicU64,
}

/// Takes spans that have ended. Clones are the same tracer; the default takes none.
#[derive(Debug, Clone, Default)]
pub struct Tracer(Option<Arc<Inner>>);

/// What sends the spans of a tracer.
#[derive(Debug)]
pub struct Sending(TaskGroup);

impl Sending {
    /// Sends what is left, for a moment at most. Spans that end later are lost.
    pub async fn finish(self) {
        self.0.shut_down(FAREWELL).await;
    }
}

impl Tracer {
    /// Starts to send spans to a collector, in the name of a service. Without a collector, nothing is traced.
    pub fn start(collector: Option<Collector>, service: Service) -> (Self, Sending) {
        let tasks = TaskGroup::new();
        let Some(collector) = collector else { return (Self::default(), Sending(tasks)) };
        let (queue, spans) = mpsc::channel(QUEUE);
        let inner = Arc::new(Inner { queue, sent: AtomicU64::new(0), lost: AtomicU64::new(0) });
        let (token, counts) = (tasks.token(), Arc::clone(&inner));
        tasks.spawn(async move { export::send(spans, collector, service, &counts, token).await });
        (Self(Some(inner)), Sending(tasks))
    }

    /// Takes a span; never waits. One for which there is no room is lost.
    pub fn note(&self, span: Span) {
        if let Some(inner) = &self.0
            && inner.queue.try_send(span).is_err()
        {
            inner.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Spans that a collector has taken, and spans that were lost.
    pub fn counts(&self) -> (u64, u64) {
        let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
        self.0.as_ref().map_or((0, 0), |inner| (count(&inner.sent), count(&inner.lost)))
    }

    /// Where parts of a span of another process belong; nowhere if there is none.
    pub fn below(&self, parent: Option<Context>) -> Scope {
        let tracer = self.clone();
        Scope { place: parent.filter(|_| self.0.is_some()).map(|context| Place { tracer, context }) }
    }

    /// Begins a trace: the one of what is named so.
    pub fn begin(&self, trace: TraceId, name: impl Into<Cow<'static, str>>) -> Open {
        Open::begin(self, trace, None, name.into())
    }
}

#[derive(Debug, Clone)]
struct Place {
    tracer: Tracer,
    context: Context,
}

/// Where new spans belong. The default is nowhere: nothing is traced.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    place: Option<Place>,
}

impl Scope {
    /// What is sent along with a call, so that the other process' spans belong here.
    pub fn context(&self) -> Option<Context> {
        self.place.as_ref().map(|place| place.context)
    }

    /// Opens a span.
    pub fn open(&self, name: impl Into<Cow<'static, str>>) -> Open {
        match &self.place {
            Some(Place { tracer, context }) => Open::begin(tracer, context.trace, Some(context.span), name.into()),
            None => Open::default(),
        }
    }

    /// Notes what took so many seconds and ends now.
    pub fn note_past(&self, name: &'static str, seconds: f64, attributes: Vec<(&'static str, Value)>) {
        let mut open = self.open(name);
        if let Some((_, span)) = &mut open.span {
            span.start = span.start.saturating_sub((seconds * 1e9) as u64);
            span.attributes = attributes;
        }
    }
}

/// A span that goes on. It ends when it is closed or dropped.
#[derive(Debug, Default)]
pub struct Open {
    span: Option<(Tracer, Span)>,
}

impl Open {
    fn begin(tracer: &Tracer, trace: TraceId, parent: Option<SpanId>, name: Cow<'static, str>) -> Self {
        if tracer.0.is_none() {
            return Self::default();
        }
        let context = Context { trace, span: SpanId::random() };
        let (start, attributes) = (unix_nanos(), Vec::new());
        let span = Span { context, parent, name, side: Side::Within, start, end: 0, attributes, error: None };
        Self { span: Some((tracer.clone(), span)) }
    }

    /// Where its parts belong.
    pub fn scope(&self) -> Scope {
        let place = |(tracer, span): &(Tracer, Span)| Place { tracer: tracer.clone(), context: span.context };
        Scope { place: self.span.as_ref().map(place) }
    }

    /// The same span, on a side of a call.
    #[must_use]
    pub fn on(mut self, side: Side) -> Self {
        if let Some((_, span)) = &mut self.span {
            span.side = side;
        }
        self
    }

    /// The same span, of which more is told.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.set(key, value);
        self
    }

    /// Tells more of it.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some((_, span)) = &mut self.span {
            span.attributes.push((key, value.into()));
        }
    }

    /// Ends it, well or not.
    pub fn close(mut self, ended: Result<(), impl Display>) {
        if let Err(error) = ended {
            self.fail(error);
        }
    }

    /// Ends it at once, and not well. What is told of it later is not heard.
    pub fn fail(&mut self, error: impl Display) {
        if let Some((_, span)) = &mut self.span {
            span.error = Some(error.to_string());
        }
        self.end();
    }

    fn end(&mut self) {
        if let Some((tracer, mut span)) = self.span.take() {
            span.end = unix_nanos();
            tracer.note(span);
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracer(room: usize) -> (Tracer, mpsc::Receiver<Span>) {
        let (queue, spans) = mpsc::channel(room);
        (Tracer(Some(Arc::new(Inner { queue, sent: AtomicU64::new(0), lost: AtomicU64::new(0) }))), spans)
    }

    #[test]
    fn spans_belong_to_the_scope_they_were_opened_in() {
        let (tracer, mut spans) = tracer(8);
        let root = tracer.begin(TraceId::of("run"), "run").with("layers", 4_usize);
        let (scope, context) = (root.scope(), root.scope().context().unwrap());
        // As another process has it.
        let elsewhere = tracer.below(Context::parse(&context.traceparent()));
        elsewhere.open("there").on(Side::Called).close(Err::<(), _>("no room"));
        scope.note_past("before", 0.5, vec![("group", 1_u32.into())]);
        root.close(Ok::<(), &str>(()));
        let ended: Vec<Span> = std::iter::from_fn(|| spans.try_recv().ok()).collect();
        let [there, before, run] = &ended[..] else { panic!("{ended:?}") };
        assert!(ended.iter().all(|span| span.context.trace == TraceId::of("run") && span.start <= span.end));
        assert_eq!((there.parent, there.error.as_deref()), (Some(run.context.span), Some("no room")));
        assert_eq!(
            (before.parent, &before.attributes[..]),
            (Some(run.context.span), &[("group", Value::Number(1))][..])
        );
        assert!(before.end - before.start >= 500_000_000);
        assert_eq!((run.parent, run.error.as_ref()), (None, None));
        assert_eq!(run.attributes, [("layers", Value::Number(4))]);
    }

    #[test]
    fn what_finds_no_room_is_counted() {
        let (tracer, spans) = tracer(2);
        for _ in 0..5 {
            drop(tracer.begin(TraceId::of("run"), "run"));
        }
        assert_eq!(tracer.counts(), (0, 3));
        drop(spans);
        drop(tracer.begin(TraceId::of("run"), "run"));
        assert_eq!(tracer.counts(), (0, 4));
    }

    #[test]
    fn without_a_collector_nothing_is_traced() {
        let tracer = Tracer::default();
        let root = tracer.begin(TraceId::of("run"), "run").with("a", "b");
        assert!(root.scope().context().is_none() && root.scope().open("part").span.is_none());
        assert!(tracer.below(Some(Context { trace: TraceId::of("x"), span: SpanId::random() })).place.is_none());
        assert_eq!(tracer.counts(), (0, 0));
    }
}

//! The Activations service and its client.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use espalier_common::fault::FaultClass;
use espalier_common::ids::{Boundary, RunId};
use espalier_common::tasks::TaskGroup;
use espalier_common::wire::run_from_wire;
use espalier_gate::trace::Context;
use espalier_gate::{Dialer, GateError, Role};
use espalier_proto::v1::activations_client::ActivationsClient;
use espalier_proto::v1::activations_server::Activations;
use espalier_proto::v1::assistance_client::AssistanceClient;
use espalier_proto::v1::head::Matter;
use espalier_proto::v1::{Begin, Chunk, FetchRequest, LinkOffer, Open, Parcel, fetch_request, parcel};
use futures::TryStreamExt as _;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

use super::chunk::{Assembler, Expected, cut};
use super::credit::{Credit, Grants};
use super::line::{Line, Offer};
use super::link::BodyError;
use super::negotiation::NegotiationError;
use super::{CHUNK_BYTES, ChunkError, WINDOW_BYTES};
use crate::calibrate::cache::{ActivationCache, CacheError};
use crate::holdings::{HiddenStates, Holdings};

/// HTTP/2 windows: as large as the credits, so that credits are what holds a sender back.
pub const HTTP2_WINDOW_BYTES: u32 = WINDOW_BYTES as u32;

/// Largest message that is decoded, of any service of a worker.
pub const MESSAGE_LIMIT_BYTES: usize = 16 << 20;

/// A peer that says nothing for so long is taken for gone.
const INACTIVITY: Duration = Duration::from_secs(30);

/// Chunks and grants that wait for the network: enough to keep it busy, and small against the credits.
const QUEUE: usize = 4;

/// Serves the boundaries that this worker holds.
#[derive(Debug)]
pub struct ActivationService {
    holdings: Holdings,
    tasks: TaskGroup,
}

impl ActivationService {
    /// Serves `holdings` with tasks of the group.
    pub fn new(holdings: Holdings, tasks: TaskGroup) -> Self {
        Self { holdings, tasks }
    }
}

#[tonic::async_trait]
impl Activations for ActivationService {
    type FetchStream = Pin<Box<dyn Stream<Item = Result<Chunk, Status>> + Send>>;

    async fn fetch(&self, request: Request<Streaming<FetchRequest>>) -> Result<Response<Self::FetchStream>, Status> {
        let mut requests = request.into_inner();
        let first = next_request(&mut requests).await?.and_then(|message| message.request);
        let Some(fetch_request::Request::Open(open)) = first else {
            return Err(Status::invalid_argument("the first message must open a boundary"));
        };
        let run = run_from_wire(open.run).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if open.credit_bytes < CHUNK_BYTES as u64 {
            return Err(Status::invalid_argument(format!("the first grant must cover a chunk of {CHUNK_BYTES} bytes")));
        }
        let boundary = Boundary(open.boundary);
        let states = self.holdings.get(&run, boundary);
        let states =
            states.ok_or_else(|| Status::not_found(format!("boundary {boundary} of run {run} is not held")))?;
        let (chunks, queue) = mpsc::channel(QUEUE);
        let token = self.tasks.token();
        self.tasks.spawn(async move {
            let sent = tokio::select! {
                sent = send(states, Credit::new(open.credit_bytes), requests, &chunks) => sent,
                () = token.cancelled() => Err(Status::unavailable("the worker is leaving")),
            };
            if let Err(status) = sent {
                // Nobody is left to be told if this fails too.
                let _ = chunks.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }
}

async fn next_request(requests: &mut Streaming<FetchRequest>) -> Result<Option<FetchRequest>, Status> {
    let silent = |_| Status::deadline_exceeded("the receiver is silent");
    tokio::time::timeout(INACTIVITY, requests.message()).await.map_err(silent)?
}

/// Sends all tensors, one in memory at a time, never beyond the receiver's credit.
async fn send(
    states: HiddenStates,
    mut credit: Credit,
    mut requests: Streaming<FetchRequest>,
    chunks: &mpsc::Sender<Result<Chunk, Status>>,
) -> Result<(), Status> {
    for (stream, entries) in states.streams.into_iter().enumerate() {
        for (sequence, entry) in entries.into_iter().enumerate() {
            let load = move || {
                let tensor = entry.take()?;
                Ok::<_, CacheError>(cut(stream as u32, sequence as u32, &tensor)?)
            };
            let pieces = tokio::task::spawn_blocking(load).await.map_err(|_| Status::internal("reading panicked"))?;
            for chunk in pieces.map_err(|error| Status::unavailable(error.to_string()))? {
                while !credit.pay(chunk.data.len() as u64) {
                    match next_request(&mut requests).await?.and_then(|message| message.request) {
                        Some(fetch_request::Request::CreditBytes(bytes)) => credit.grant(bytes),
                        Some(fetch_request::Request::Open(_)) => {
                            return Err(Status::invalid_argument("a stream opens one boundary"));
                        }
                        None => return Ok(()),
                    }
                }
                if chunks.send(Ok(chunk)).await.is_err() {
                    return Ok(()); // the receiver went away
                }
            }
        }
    }
    Ok(())
}

/// One boundary of one run, on one peer.
#[derive(Debug, Clone)]
pub struct Remote {
    /// The peer's endpoint.
    pub endpoint: String,
    /// The run.
    pub run: RunId,
    /// The boundary.
    pub boundary: Boundary,
}

/// Why hidden states did not come over.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Not a URL that can be called.
    #[error("`{endpoint}` is no worker's endpoint")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        #[source]
        source: tonic::transport::Error,
    },
    /// Not a URL that may be called.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The peer does not hold the boundary (any more).
    #[error("{endpoint} does not hold boundary {boundary}")]
    NotHeld {
        /// The peer.
        endpoint: String,
        /// What was asked for.
        boundary: Boundary,
    },
    /// The call failed.
    #[error("fetching boundary {boundary} from {endpoint}")]
    Call {
        /// The peer.
        endpoint: String,
        /// What was asked for.
        boundary: Boundary,
        /// What tonic said.
        #[source]
        source: Box<tonic::Status>,
    },
    /// Nothing came for too long.
    #[error("{endpoint} sent nothing of boundary {boundary} for {seconds} s")]
    Silent {
        /// The peer.
        endpoint: String,
        /// What was asked for.
        boundary: Boundary,
        /// How long we waited.
        seconds: u64,
    },
    /// What came is not what was asked for.
    #[error("boundary {boundary} from {endpoint}")]
    Chunk {
        /// The peer.
        endpoint: String,
        /// What was asked for.
        boundary: Boundary,
        /// What is wrong with it.
        #[source]
        source: ChunkError,
    },
    /// A worker that shares a layer with this one is gone, or says so.
    #[error("sharing a layer with {endpoint}")]
    Shared {
        /// The other worker.
        endpoint: String,
        /// What tonic said.
        #[source]
        source: Box<tonic::Status>,
    },
    /// A letter did not go over, or breaks the protocol.
    #[error("letters to and from {endpoint}")]
    Body {
        /// The other worker.
        endpoint: String,
        /// What is wrong.
        #[source]
        source: BodyError,
    },
    /// Nothing was agreed on to join the two with.
    #[error("agreeing on a link with {endpoint}")]
    Negotiation {
        /// The other worker.
        endpoint: String,
        /// What is wrong.
        #[source]
        source: NegotiationError,
    },
    /// What was to be sent to it cannot be read.
    #[error("letter to {endpoint}")]
    Unreadable {
        /// The other worker.
        endpoint: String,
        /// Why.
        #[source]
        source: CacheError,
    },
    /// The unit was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl LinkError {
    /// What may be done about it. A peer that lacks the boundary will lack it again: somebody must start from elsewhere.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Endpoint { .. } => FaultClass::Bug,
            Self::Gate(_) | Self::NotHeld { .. } | Self::Silent { .. } | Self::Unreadable { .. } | Self::Cancelled => {
                FaultClass::RetryElsewhere
            }
            Self::Body { source, .. } => source.class(),
            Self::Call { .. } | Self::Chunk { .. } | Self::Shared { .. } | Self::Negotiation { .. } => {
                FaultClass::RetryHere
            }
        }
    }
}

/// Why a boundary could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// It did not come over.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// It could not be kept.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// Fetches a boundary from a peer into the cache. Nothing of it is kept unless all of it arrived as expected.
///
/// # Errors
/// See [`LinkError`] and [`CacheError`].
pub async fn fetch(
    remote: &Remote,
    peers: &Dialer,
    expected: Expected,
    cache: &ActivationCache,
    token: &CancellationToken,
) -> Result<HiddenStates, FetchError> {
    tokio::select! {
        fetched = receive(remote, peers, expected, cache) => fetched,
        () = token.cancelled() => Err(LinkError::Cancelled.into()),
    }
}

async fn receive(
    remote: &Remote,
    peers: &Dialer,
    expected: Expected,
    cache: &ActivationCache,
) -> Result<HiddenStates, FetchError> {
    let Remote { endpoint, run, boundary } = remote;
    let failed = |source: Status| match source.code() {
        Code::NotFound => LinkError::NotHeld { endpoint: endpoint.clone(), boundary: *boundary },
        _ => LinkError::Call { endpoint: endpoint.clone(), boundary: *boundary, source: Box::new(source) },
    };
    let silent =
        |_| LinkError::Silent { endpoint: endpoint.clone(), boundary: *boundary, seconds: INACTIVITY.as_secs() };
    let wrong = |source| LinkError::Chunk { endpoint: endpoint.clone(), boundary: *boundary, source };
    let channel = channel(endpoint, peers)?;
    let mut client = ActivationsClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT_BYTES);
    let (grants, queue) = mpsc::channel(QUEUE);
    let open = Open { run: run.0.clone(), boundary: boundary.0, credit_bytes: WINDOW_BYTES };
    let opening = FetchRequest { request: Some(fetch_request::Request::Open(open)) };
    grants.try_send(opening).expect("the queue is empty and its receiver alive");
    let call = client.fetch(ReceiverStream::new(queue));
    let mut chunks = tokio::time::timeout(INACTIVITY, call).await.map_err(silent)?.map_err(failed)?.into_inner();

    let mut assembler = Assembler::new(expected).map_err(wrong)?;
    let mut ledger = Grants::new(WINDOW_BYTES);
    let mut streams = vec![Vec::new(); expected.streams];
    while let Some(chunk) = tokio::time::timeout(INACTIVITY, chunks.message()).await.map_err(silent)?.map_err(failed)? {
        if let Some((stream, tensor)) = assembler.push(&chunk).map_err(wrong)? {
            streams[stream].push(cache.put(tensor)?);
        }
        if let Some(bytes) = ledger.consume(chunk.data.len() as u64) {
            // A sender that is done no longer listens; whether it was done is for `finish` to tell.
            let _ = grants.send(FetchRequest { request: Some(fetch_request::Request::CreditBytes(bytes)) }).await;
        }
    }
    assembler.finish().map_err(wrong)?;
    Ok(HiddenStates { streams })
}

impl<S: Fn(&Matter) -> Option<u64>> Line<S> {
    /// Calls an assistant through `peers`, and carries letters until either side has no more to say.
    pub async fn call(mut self, peers: &Dialer, mut begin: Begin) {
        let mut offer = Offer::None;
        if let Some(joining) = self.joining.clone() {
            // A library may have to open a socket to make a name.
            let (asking, endpoint) = (Arc::clone(&joining), self.endpoint.clone());
            let named = tokio::task::spawn_blocking(move || asking.offer_to(&endpoint)).await;
            offer = match named.unwrap_or_else(|_| Err("making a name panicked".to_owned())) {
                Ok(id) => {
                    let facts = Some(joining.facts());
                    begin.link = Some(LinkOffer { facts, id: id.clone().into() });
                    Offer::Made(id)
                }
                Err(reason) => Offer::Failed(reason),
            };
        }
        let (out, queue) = mpsc::channel(QUEUE);
        let opening = Parcel { content: Some(parcel::Content::Begin(begin)) };
        out.try_send(opening).expect("the queue is empty and its receiver alive");
        let called = async {
            let channel = channel(&self.endpoint, peers)?;
            let mut client = AssistanceClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT_BYTES);
            let mut request = Request::new(ReceiverStream::new(queue));
            Context::send_along(self.trace, &mut request);
            client.assist(request).await.map_err(|source| self.shared(source))
        };
        let ended = match called.await {
            Ok(response) => self.carry_on(offer, response.into_inner(), &out).await,
            Err(error) => Err(error),
        };
        self.tell_end(ended).await;
    }

    /// Answers an owner whose call was taken, and who may have offered a link, until either side has no more to say.
    pub async fn answer(mut self, offer: Option<LinkOffer>, parcels: Streaming<Parcel>, out: mpsc::Sender<Parcel>) {
        let offer = offer.map_or(Offer::None, Offer::Heard);
        let ended = self.carry_on(offer, parcels, &out).await;
        self.tell_end(ended).await;
    }

    fn shared(&self, source: Status) -> LinkError {
        LinkError::Shared { endpoint: self.endpoint.clone(), source: Box::new(source) }
    }

    async fn carry_on(
        &mut self,
        offer: Offer,
        parcels: Streaming<Parcel>,
        out: &mpsc::Sender<Parcel>,
    ) -> Result<(), LinkError> {
        let endpoint = self.endpoint.clone();
        let shared = move |source| LinkError::Shared { endpoint: endpoint.clone(), source: Box::new(source) };
        self.carry(offer, parcels.map_err(shared), out, INACTIVITY).await
    }
}

/// How a worker calls another.
fn channel(endpoint: &str, peers: &Dialer) -> Result<Channel, LinkError> {
    let connector = peers.connector(endpoint, Role::Worker)?;
    let parsed = Endpoint::from_shared(endpoint.to_owned());
    Ok(parsed
        .map_err(|source| LinkError::Endpoint { endpoint: endpoint.to_owned(), source })?
        .connect_timeout(Duration::from_secs(5))
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(HTTP2_WINDOW_BYTES)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .connect_with_connector_lazy(connector))
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::{Device, Tensor};
    use espalier_proto::v1::activations_server::ActivationsServer;
    use espalier_proto::v1::assistance_server::{Assistance, AssistanceServer};
    use tonic::transport::Server;
    use tonic::transport::server::{Router, TcpIncoming};

    use super::super::line::bare;
    use super::super::ring::Ring;
    use super::super::stream::StreamLink;
    use super::*;

    /// Takes calls, and hands out their streams.
    struct Answering(mpsc::Sender<Call>);

    /// What the caller says, and where to answer.
    type Call = (Streaming<Parcel>, mpsc::Sender<Result<Parcel, Status>>);

    #[tonic::async_trait]
    impl Assistance for Answering {
        type AssistStream = ReceiverStream<Result<Parcel, Status>>;

        async fn assist(&self, call: Request<Streaming<Parcel>>) -> Result<Response<Self::AssistStream>, Status> {
            let (out, queue) = mpsc::channel(QUEUE);
            self.0.send((call.into_inner(), out)).await.unwrap();
            Ok(Response::new(ReceiverStream::new(queue)))
        }
    }

    /// Both ends of a link over a call that is really made.
    pub(in crate::transport) async fn stream_pair(
        rings: [Option<Ring>; 2],
        tasks: &TaskGroup,
    ) -> (StreamLink, StreamLink) {
        let (calls, mut called) = mpsc::channel(1);
        let endpoint = listen(tasks, |server| server.add_service(AssistanceServer::new(Answering(calls))));
        let (out, queue) = mpsc::channel(QUEUE);
        let mut client = AssistanceClient::connect(endpoint).await.unwrap();
        let answers = client.assist(ReceiverStream::new(queue)).await.unwrap().into_inner();
        let (parcels, answer) = called.recv().await.unwrap();
        let failed = |source| LinkError::Shared { endpoint: String::new(), source: Box::new(source) };
        let (answered, mut unwrapped) = mpsc::channel(QUEUE);
        let token = tasks.token();
        tasks.spawn(async move {
            while let Some(Some(parcel)) = token.run_until_cancelled(unwrapped.recv()).await {
                if answer.send(Ok(parcel)).await.is_err() {
                    return;
                }
            }
        });
        let [ours, theirs] = rings;
        (bare(answers.map_err(failed), out, ours, tasks), bare(parcels.map_err(failed), answered, theirs, tasks))
    }

    /// Serves on a free port of loopback; returns the endpoint.
    fn listen(tasks: &TaskGroup, add: impl FnOnce(&mut Server) -> Router) -> String {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap().with_nodelay(Some(true));
        let endpoint = format!("http://{}", incoming.local_addr().unwrap());
        let mut server = Server::builder()
            .initial_stream_window_size(HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(HTTP2_WINDOW_BYTES);
        let (router, token) = (add(&mut server), tasks.token());
        tasks.spawn(async move {
            router.serve_with_incoming_shutdown(incoming, token.cancelled_owned()).await.unwrap();
        });
        endpoint
    }

    const EXPECTED: Expected = Expected { streams: 2, sequences: 8, tokens: 2048, hidden: 1024 };

    fn cache() -> ActivationCache {
        ActivationCache::new(u64::MAX, std::env::temp_dir())
    }

    fn states(expected: Expected) -> HiddenStates {
        let cache = cache();
        let Expected { streams, sequences, tokens, hidden } = expected;
        let tensor = |start: usize| {
            let values = (0..tokens * hidden).map(|index| (start + index) as f32).collect();
            cache.put(Tensor::from_vec(values, (tokens, hidden), &Device::Cpu).unwrap()).unwrap()
        };
        let stream = |stream: usize| (0..sequences).map(|sequence| tensor(stream * 1000 + sequence)).collect();
        HiddenStates { streams: (0..streams).map(stream).collect() }
    }

    /// Serves boundary 3 of run `r`; returns the endpoint.
    fn serve(tasks: &TaskGroup, states: HiddenStates) -> Remote {
        let (run, boundary) = (RunId("r".to_owned()), Boundary(3));
        let holdings = Holdings::default();
        holdings.hold(&run, boundary, states);
        let service = ActivationsServer::new(ActivationService::new(holdings, tasks.clone()));
        let endpoint = listen(tasks, |server| server.add_service(service));
        Remote { endpoint, run, boundary }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_boundary_comes_over_bit_for_bit() {
        let tasks = TaskGroup::new();
        let sent = states(EXPECTED);
        let remote = serve(&tasks, sent.clone());
        let fetched = fetch(&remote, &Dialer::default(), EXPECTED, &cache(), &tasks.token()).await.unwrap();
        for (sent, fetched) in sent.streams.iter().flatten().zip(fetched.streams.iter().flatten()) {
            let values = |entry: &crate::calibrate::cache::Entry| entry.load().unwrap().to_vec2::<f32>().unwrap();
            assert!(values(sent) == values(fetched));
        }
        assert!(tasks.shut_down(Duration::from_secs(5)).await);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_not_held_or_not_as_expected_is_told() {
        let tasks = TaskGroup::new();
        let small = Expected { streams: 1, sequences: 2, tokens: 4, hidden: 8 };
        let remote = serve(&tasks, states(small));
        let elsewhere = Remote { boundary: Boundary(4), ..remote.clone() };
        let error = fetch(&elsewhere, &Dialer::default(), small, &cache(), &tasks.token()).await.unwrap_err();
        assert!(matches!(error, FetchError::Link(LinkError::NotHeld { .. })), "{error}");
        for wrong in
            [Expected { hidden: 9, ..small }, Expected { sequences: 3, ..small }, Expected { streams: 2, ..small }]
        {
            let error = fetch(&remote, &Dialer::default(), wrong, &cache(), &tasks.token()).await.unwrap_err();
            assert!(matches!(error, FetchError::Link(LinkError::Chunk { .. })), "{error}");
        }
        assert!(tasks.shut_down(Duration::from_secs(5)).await);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_sender_stops_at_its_credit() {
        let tasks = TaskGroup::new();
        let remote = serve(&tasks, states(EXPECTED));
        let (grants, queue) = mpsc::channel(QUEUE);
        let mut client = ActivationsClient::connect(remote.endpoint.clone()).await.unwrap();
        let open = Open { run: "r".to_owned(), boundary: 3, credit_bytes: 3 * CHUNK_BYTES as u64 };
        grants.send(FetchRequest { request: Some(fetch_request::Request::Open(open)) }).await.unwrap();
        let mut chunks = client.fetch(ReceiverStream::new(queue)).await.unwrap().into_inner();
        let mut received = 0;
        for _ in 0..3 {
            received += chunks.message().await.unwrap().unwrap().data.len();
        }
        assert_eq!(received, 3 * CHUNK_BYTES);
        let more = tokio::time::timeout(Duration::from_millis(100), chunks.message()).await;
        assert!(more.is_err(), "the sender went beyond its credit");
        let grant = fetch_request::Request::CreditBytes(CHUNK_BYTES as u64);
        grants.send(FetchRequest { request: Some(grant) }).await.unwrap();
        assert_eq!(chunks.message().await.unwrap().unwrap().data.len(), CHUNK_BYTES);
        drop((grants, chunks));
        assert!(tasks.shut_down(Duration::from_secs(5)).await);
    }
}

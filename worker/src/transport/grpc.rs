//! The Activations service and its client.

use std::pin::Pin;
use std::time::Duration;

use espalier_common::fault::FaultClass;
use espalier_common::ids::{Boundary, RunId};
use espalier_common::tasks::TaskGroup;
use espalier_common::wire::run_from_wire;
use espalier_gate::{Dialer, GateError, Role};
use espalier_proto::v1::activations_client::ActivationsClient;
use espalier_proto::v1::activations_server::Activations;
use espalier_proto::v1::assistance_client::AssistanceClient;
use espalier_proto::v1::head::Matter;
use espalier_proto::v1::{Begin, Chunk, FetchRequest, Open, Parcel, fetch_request, parcel};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

use super::chunk::{Assembler, Expected, cut};
use super::credit::{Credit, Grants};
use super::parcel::{Letter, LetterBox, Outgoing, ParcelError, head, pieces};
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
    /// What it says breaks the protocol.
    #[error("letter from {endpoint}")]
    Parcel {
        /// The other worker.
        endpoint: String,
        /// What is wrong with it.
        #[source]
        source: ParcelError,
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
            Self::Call { .. } | Self::Chunk { .. } | Self::Shared { .. } | Self::Parcel { .. } => FaultClass::RetryHere,
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

/// What came from a worker that shares a layer with this one.
#[derive(Debug)]
pub struct Received {
    /// Which one, as the receiver numbers them.
    pub from: usize,
    /// A letter, or why there will be none any more.
    pub letter: Result<Letter, LinkError>,
}

/// One worker that shares a layer with this one, and what is sent to it and received from it.
pub struct Line<S> {
    /// Its endpoint, or a word for it.
    pub endpoint: String,
    /// Its number.
    pub number: usize,
    /// How large the body of a letter must be, if it may come at all.
    pub size_of: S,
    /// What to send.
    pub letters: mpsc::Receiver<Outgoing>,
    /// Where to put what comes. The end of the line is the last of it.
    pub received: mpsc::Sender<Received>,
}

impl<S: Fn(&Matter) -> Option<u64>> Line<S> {
    /// Calls an assistant through `peers`, and carries letters until either side has no more to say.
    pub async fn call(mut self, peers: &Dialer, begin: Begin) {
        let (out, queue) = mpsc::channel(QUEUE);
        let opening = Parcel { content: Some(parcel::Content::Begin(begin)) };
        out.try_send(opening).expect("the queue is empty and its receiver alive");
        let called = async {
            let channel = channel(&self.endpoint, peers)?;
            let mut client = AssistanceClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT_BYTES);
            client.assist(ReceiverStream::new(queue)).await.map_err(|source| self.shared(source))
        };
        let ended = match called.await {
            Ok(response) => self.carry(response.into_inner(), &out).await,
            Err(error) => Err(error),
        };
        self.tell_end(ended).await;
    }

    /// Answers an owner whose call was taken, until either side has no more to say.
    pub async fn answer(mut self, parcels: Streaming<Parcel>, out: mpsc::Sender<Parcel>) {
        let ended = self.carry(parcels, &out).await;
        self.tell_end(ended).await;
    }

    fn shared(&self, source: Status) -> LinkError {
        LinkError::Shared { endpoint: self.endpoint.clone(), source: Box::new(source) }
    }

    async fn tell_end(&self, ended: Result<(), LinkError>) {
        if let Err(error) = ended {
            // Whoever listened may be through with it.
            let _ = self.received.send(Received { from: self.number, letter: Err(error) }).await;
        }
    }

    async fn carry(&mut self, parcels: Streaming<Parcel>, out: &mpsc::Sender<Parcel>) -> Result<(), LinkError> {
        let Self { endpoint, number, size_of, letters, received } = self;
        // A window each way, granted from the start.
        let purse = Semaphore::new(WINDOW_BYTES as usize);
        tokio::select! {
            written = write(letters, endpoint, out, &purse) => written,
            read = read(parcels, (endpoint, *number), size_of, received, out, &purse) => read,
        }
    }
}

/// Sends letters, never beyond what the receiver granted.
async fn write(
    letters: &mut mpsc::Receiver<Outgoing>,
    endpoint: &str,
    out: &mpsc::Sender<Parcel>,
    purse: &Semaphore,
) -> Result<(), LinkError> {
    while let Some(Outgoing { matter, body }) = letters.recv().await {
        let unreadable = |source| LinkError::Unreadable { endpoint: endpoint.to_owned(), source };
        let body = tokio::task::spawn_blocking(move || body.into_bytes()).await.map_err(|_| LinkError::Cancelled)?;
        let body = body.map_err(unreadable)?;
        let opening = parcel::Content::Head(head(matter, &body));
        if out.send(Parcel { content: Some(opening) }).await.is_err() {
            return Ok(()); // the other side went away, as reading tells
        }
        for piece in pieces(body) {
            let paid = purse.acquire_many(piece.data.len() as u32).await;
            paid.expect("nobody closes the purse").forget();
            if out.send(Parcel { content: Some(parcel::Content::Piece(piece)) }).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Receives letters, and grants again what was taken of them.
async fn read(
    mut parcels: Streaming<Parcel>,
    (endpoint, number): (&str, usize),
    size_of: &impl Fn(&Matter) -> Option<u64>,
    received: &mpsc::Sender<Received>,
    out: &mpsc::Sender<Parcel>,
    purse: &Semaphore,
) -> Result<(), LinkError> {
    let shared = |source| LinkError::Shared { endpoint: endpoint.to_owned(), source: Box::new(source) };
    let wrong = |source| LinkError::Parcel { endpoint: endpoint.to_owned(), source };
    let (mut letters, mut ledger) = (LetterBox::default(), Grants::new(WINDOW_BYTES));
    while let Some(parcel) = parcels.message().await.map_err(shared)? {
        let letter = match parcel.content {
            Some(parcel::Content::Head(head)) => letters.open(head, size_of).map_err(wrong)?,
            Some(parcel::Content::Piece(piece)) => {
                let letter = letters.add(&piece).map_err(wrong)?;
                if let Some(bytes) = ledger.consume(piece.data.len() as u64) {
                    // A sender that is done no longer listens.
                    let _ = out.send(Parcel { content: Some(parcel::Content::CreditBytes(bytes)) }).await;
                }
                letter
            }
            Some(parcel::Content::CreditBytes(bytes)) => {
                let more = usize::try_from(bytes).unwrap_or(usize::MAX);
                if purse.available_permits().saturating_add(more) > WINDOW_BYTES as usize {
                    return Err(shared(Status::invalid_argument("more was granted than a window")));
                }
                purse.add_permits(more);
                None
            }
            Some(parcel::Content::Begin(_)) | None => return Err(wrong(ParcelError::OutOfTurn)),
        };
        if let Some(letter) = letter
            && received.send(Received { from: number, letter: Ok(letter) }).await.is_err()
        {
            return Ok(());
        }
    }
    Err(shared(Status::unavailable("it has hung up")))
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
mod tests {
    use candle_core::{Device, Tensor};
    use espalier_proto::v1::activations_server::ActivationsServer;
    use tonic::transport::server::TcpIncoming;

    use super::*;

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
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap().with_nodelay(Some(true));
        let endpoint = format!("http://{}", incoming.local_addr().unwrap());
        let service = ActivationsServer::new(ActivationService::new(holdings, tasks.clone()));
        let token = tasks.token();
        tasks.spawn(async move {
            tonic::transport::Server::builder()
                .initial_stream_window_size(HTTP2_WINDOW_BYTES)
                .initial_connection_window_size(HTTP2_WINDOW_BYTES)
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, token.cancelled_owned())
                .await
                .unwrap();
        });
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

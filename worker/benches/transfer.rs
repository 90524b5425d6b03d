//! Hidden states from one worker to another over loopback, as a run moves them (credits, checksums, reassembly into the
//! cache), against a plain TCP socket that moves the same bytes: `cargo bench --workspace --bench transfer`.

#![allow(clippy::print_stdout, reason = "a table is what this program is for")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use espalier_common::clock::Stopwatch;
use espalier_common::ids::{Boundary, RunId};
use espalier_common::tasks::TaskGroup;
use espalier_gate::Dialer;
use espalier_proto::v1::activations_server::ActivationsServer;
use espalier_worker::calibrate::cache::ActivationCache;
use espalier_worker::holdings::{HiddenStates, Holdings};
use espalier_worker::transport::grpc::{ActivationService, HTTP2_WINDOW_BYTES};
use espalier_worker::transport::{CHUNK_BYTES, Expected, Remote, fetch};
use tonic::transport::server::TcpIncoming;

/// 32 sequences of 2048 tokens, 1024 wide: 256 MiB.
const EXPECTED: Expected = Expected { streams: 1, sequences: 32, tokens: 2048, hidden: 1024 };
/// The two ways take turns, so that a machine that slows down slows both.
const ROUNDS: usize = 7;

#[tokio::main]
async fn main() -> Result<()> {
    let tasks = TaskGroup::new();
    let remote = serve(&tasks)?;
    let (mut plain, mut ours) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let socket = tokio::task::spawn_blocking(over_a_socket).await??;
        let cache = ActivationCache::new(u64::MAX, std::env::temp_dir());
        let watch = Stopwatch::start();
        let fetched = fetch(&remote, &Dialer::default(), EXPECTED, &cache, &tasks.token()).await?;
        let seconds = watch.seconds();
        ensure!(fetched.streams[0].len() == EXPECTED.sequences, "sequences are missing");
        // The first round touches memory for the first time.
        if round > 0 {
            plain.push(socket);
            ours.push(seconds);
        }
    }
    let gigabytes = EXPECTED.bytes() as f64 / 1e9;
    println!("{:.0} MiB over loopback, {ROUNDS} rounds, GB/s: slowest, median, fastest", gigabytes * 1e9 / 1048576.0);
    for (name, seconds) in [("plain TCP socket", &mut plain), ("hidden states", &mut ours)] {
        seconds.sort_by(f64::total_cmp);
        let rate = |index: usize| gigabytes / seconds[index];
        println!("{name:<18} {:>6.2} {:>6.2} {:>6.2}", rate(ROUNDS - 1), rate(ROUNDS / 2), rate(0));
    }
    println!("share of the socket, median: {:.2}", plain[ROUNDS / 2] / ours[ROUNDS / 2]);
    ensure!(tasks.shut_down(Duration::from_secs(5)).await, "the service does not end");
    Ok(())
}

/// Serves a boundary as a worker does.
fn serve(tasks: &TaskGroup) -> Result<Remote> {
    let (run, boundary) = (RunId("bench".to_owned()), Boundary(1));
    let cache = ActivationCache::new(u64::MAX, std::env::temp_dir());
    let Expected { sequences, tokens, hidden, .. } = EXPECTED;
    let values: Vec<f32> = (0..tokens * hidden).map(|index| index as f32).collect();
    let tensor = |_| Ok(cache.put(Tensor::from_slice(&values, (tokens, hidden), &Device::Cpu)?)?);
    let streams = vec![(0..sequences).map(tensor).collect::<Result<_>>()?];
    let holdings = Holdings::default();
    holdings.hold(&run, boundary, HiddenStates { streams });
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse()?)?.with_nodelay(Some(true));
    let endpoint = format!("http://{}", incoming.local_addr()?);
    let service = ActivationsServer::new(ActivationService::new(holdings, tasks.clone()));
    let token = tasks.token();
    tasks.spawn(async move {
        let server = tonic::transport::Server::builder()
            .initial_stream_window_size(HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(HTTP2_WINDOW_BYTES)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, token.cancelled_owned());
        // A service that ends early shows as a fetch that fails.
        let _ = server.await;
    });
    Ok(Remote { endpoint, run, boundary })
}

/// Seconds that the same bytes take through a socket, in writes of a chunk each.
fn over_a_socket() -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let bytes = usize::try_from(EXPECTED.bytes())?;
    let sender = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let chunk = vec![1u8; CHUNK_BYTES];
        (0..bytes / CHUNK_BYTES).try_for_each(|_| stream.write_all(&chunk))
    });
    let mut stream = TcpStream::connect(address)?;
    let mut received = vec![0u8; bytes];
    let watch = Stopwatch::start();
    stream.read_exact(&mut received)?;
    let seconds = watch.seconds();
    ensure!(received.iter().all(|&byte| byte == 1), "bytes were lost");
    sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    Ok(seconds)
}

//! Bytes from a disk, a wire or a user, whatever they are: every reader returns, none panics, and none asks for memory that the bytes
//! do not account for. Good input is damaged at random; the seed of a failure is in its message.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use espalier_common::calibration::TokenBlock;
use espalier_common::checkpoint;
use espalier_common::config::{ENV_PREFIX, Overrides, load, parse_document};
use espalier_common::job::JobSpec;
use espalier_common::outline::ModelOutline;
use espalier_common::wire;
use espalier_coordinator::journal;
use espalier_coordinator::plan::cluster::ClusterSpec;
use espalier_gate::{TlsSection, Tokens};
use espalier_proto::v1 as pb;
use espalier_worker::config::WorkerConfig;
use espalier_worker::transport::chunk::{Assembler, Expected};
use harness::authority::{Authority, write_secret};
use harness::{golden, tiny};
use proptest::prelude::*;
use prost::Message as _;

/// Notes the largest block that this thread asked for.
struct Watching;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

fn note(size: usize) {
    // A thread that is ending has nothing left to note in.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

#[allow(unsafe_code, reason = "an allocator is made of it")]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as ours.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as ours.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as ours.
        unsafe { System.dealloc(block, layout) }
    }
}

/// What a reader may ask for at once: what parsed structures take more than their text, and buffers of fixed size.
fn bound(input: usize) -> usize {
    input * 64 + (4 << 20)
}

/// Runs a reader over so many bytes; it may say what it likes.
fn survives<T>(input: usize, read: impl FnOnce() -> T) -> Result<T, TestCaseError> {
    LARGEST.set(0);
    let said = read();
    let largest = LARGEST.get();
    prop_assert!(largest <= bound(input), "{largest} bytes at once for an input of {input}");
    Ok(said)
}

/// One way to damage bytes.
#[derive(Debug, Clone)]
enum Damage {
    /// The rest is gone.
    Cut(prop::sample::Index),
    /// One byte is another.
    Byte(prop::sample::Index, u8),
    /// Eight bytes are a number: where sizes stand, an absurd one.
    Number(prop::sample::Index, u64),
    /// Something stands in between.
    Insert(prop::sample::Index, Vec<u8>),
    /// Something is there twice.
    Twice(prop::sample::Index, prop::sample::Index),
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        match self {
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Self::Byte(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Self::Number(at, number) => {
                let at = at.index(bytes.len());
                let end = bytes.len().min(at + 8);
                bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            Self::Insert(at, more) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Twice(from, to) => {
                let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
                let piece = bytes[from.min(to)..from.max(to)].to_vec();
                bytes.splice(to..to, piece);
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let place = any::<prop::sample::Index>;
    let edges = prop::sample::select(vec![0, 1, 7, 1 << 31, u64::from(u32::MAX), 1 << 40, i64::MAX as u64, u64::MAX]);
    let words = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        "\"",
        ":",
        ",",
        "0",
        "-1",
        "1e999",
        "null",
        "\n",
        "[[",
        "\u{0}",
        "é",
        "9999999999999999999",
    ]);
    let one = prop_oneof![
        place().prop_map(Damage::Cut),
        (place(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        (place(), edges).prop_map(|(at, number)| Damage::Number(at, number)),
        (place(), words).prop_map(|(at, word)| Damage::Insert(at, word.as_bytes().to_vec())),
        (place(), prop::collection::vec(any::<u8>(), 1..16)).prop_map(|(at, more)| Damage::Insert(at, more)),
        (place(), place()).prop_map(|(from, to)| Damage::Twice(from, to)),
    ];
    prop::collection::vec(one, 1..6)
}

fn damaged(good: &[u8], damage: &[Damage]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    damage.iter().for_each(|damage| damage.apply(&mut bytes));
    bytes
}

/// Bytes that are damaged, or that were never any good.
fn foreign(good: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let noise = prop::collection::vec(any::<u8>(), 0..512);
    prop_oneof![
        6 => damage().prop_map(move |damage| damaged(&good, &damage)),
        1 => noise,
    ]
}

/// Enough to meet what single edits can do, in a few seconds.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn check<S: Strategy>(cases: u32, strategy: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>)
where
    S::Value: std::fmt::Debug,
{
    let mut runner = proptest::test_runner::TestRunner::new(config(cases));
    runner.run(&strategy, test).unwrap_or_else(|error| panic!("{error}"));
}

/// Opens a checkpoint and reads all that it says it has.
fn read_all(path: &Path) -> usize {
    let Ok(checkpoint) = checkpoint::open(path) else { return 0 };
    let _ = checkpoint.companion_files();
    let names: Vec<_> = checkpoint.names().into_iter().map(str::to_owned).collect();
    names.iter().filter(|name| checkpoint.read(name).is_ok()).count()
}

/// A small checkpoint as safetensors: its header, and what follows it.
fn safetensors() -> (Vec<u8>, Vec<u8>) {
    let header = br#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[4,8],"data_offsets":[0,128]},"b.bias":{"dtype":"BF16","shape":[16],"data_offsets":[128,160]}}"#;
    let mut front = (header.len() as u64).to_le_bytes().to_vec();
    front.extend_from_slice(header);
    (front, vec![7; 160])
}

#[test]
fn a_safetensors_file_may_hold_anything() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(tiny("llama-tiny").join("config.json"), folder.path().join("config.json")).unwrap();
    let (front, data) = safetensors();
    let whole = [front.clone(), data.clone()].concat();
    fs::write(folder.path().join("model.safetensors"), &whole).unwrap();
    assert_eq!(read_all(folder.path()), 2, "the good one is good");
    check(2000, foreign(front), |front| {
        let bytes = [front, data.clone()].concat();
        fs::write(folder.path().join("model.safetensors"), &bytes).unwrap();
        survives(bytes.len(), || read_all(folder.path())).map(drop)
    });
}

#[test]
fn an_index_and_a_config_may_say_anything() {
    let folder = tempfile::tempdir().unwrap();
    let (front, data) = safetensors();
    fs::write(folder.path().join("model-00001-of-00001.safetensors"), [front, data].concat()).unwrap();
    let good = br#"{"metadata":{"total_size":160},"weight_map":{"a.weight":"model-00001-of-00001.safetensors","b.bias":"model-00001-of-00001.safetensors"}}"#;
    let config = fs::read(tiny("llama-tiny").join("config.json")).unwrap();
    fs::write(folder.path().join("config.json"), &config).unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), good).unwrap();
    assert_eq!(read_all(folder.path()), 2, "the good one is good");
    check(1000, (foreign(good.to_vec()), foreign(config)), |(index, config)| {
        fs::write(folder.path().join("model.safetensors.index.json"), &index).unwrap();
        fs::write(folder.path().join("config.json"), &config).unwrap();
        survives(index.len() + config.len() + 512, || read_all(folder.path())).map(drop)
    });
}

#[test]
fn a_gguf_file_may_hold_anything() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let good = fs::read(golden().join("gguf/llama.gguf")).unwrap();
    fs::write(&path, &good).unwrap();
    assert!(read_all(&path) > 10, "the good one is good");
    // Damage to weights is no damage to the file: most of it goes to the front.
    let front = good.len() / 20;
    let (head, tail) = (good[..front].to_vec(), good[front..].to_vec());
    check(300, foreign(head), |head| {
        let bytes = [head, tail.clone()].concat();
        fs::write(&path, &bytes).unwrap();
        survives(bytes.len(), || read_all(&path)).map(drop)
    });
}

#[test]
fn a_journal_may_hold_anything() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let record = r#"{"created":{"run":"r","job":{"model":{"source":"m"},"calibration":{"source":"c"},"output":{"uri":"o"}},"tokens":{"name":"t","sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","bytes":0},"model_fingerprint":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","created":0}}"#;
    let line = |json: &[u8]| [format!("{:08x} ", crc32fast::hash(json)).as_bytes(), json, b"\n"].concat();
    fs::write(&path, line(record.as_bytes())).unwrap();
    assert_eq!(journal::read(&path).unwrap().len(), 1, "the good one is good");
    // A checksum that is right guards nothing against whoever can count.
    check(2000, (foreign(record.as_bytes().to_vec()), foreign(line(record.as_bytes()))), |(json, raw)| {
        let bytes = [line(&json), raw].concat();
        fs::write(&path, &bytes).unwrap();
        survives(bytes.len(), || journal::read(&path)).map(drop)
    });
}

#[test]
fn a_stream_of_hidden_states_may_bring_anything() {
    let expected = Expected { streams: 2, sequences: 2, tokens: 4, hidden: 8 };
    let good = |stream, sequence| {
        let data = vec![3; 128];
        let crc32 = crc32fast::hash(&data);
        pb::Chunk { stream, sequence, offset: 0, data: data.into(), crc32, tokens: 4, hidden: 8 }
    };
    let mut assembler = Assembler::new(expected).unwrap();
    assert!(assembler.push(&good(0, 0)).unwrap().is_some(), "the good one is good");
    let first = good(0, 0).encode_to_vec();
    check(3000, prop::collection::vec(foreign(first), 1..6), |messages| {
        let bytes = messages.iter().map(Vec::len).sum();
        survives(bytes, || {
            let mut assembler = Assembler::new(expected).unwrap();
            for message in &messages {
                let Ok(chunk) = pb::Chunk::decode(&message[..]) else { continue };
                if assembler.push(&chunk).is_err() {
                    return;
                }
            }
            let _ = assembler.finish();
        })
    });
    let sizes = (any::<usize>(), any::<usize>(), any::<usize>(), any::<usize>());
    check(500, sizes, |(streams, sequences, tokens, hidden)| {
        let expected = Expected { streams, sequences, tokens, hidden };
        // Whoever wants more than this has been refused before: see what a worker expects of a job's own sizes.
        if expected.tokens.saturating_mul(expected.hidden) > 1 << 20
            && tokens.checked_mul(hidden).is_some_and(|n| n.checked_mul(4).is_some())
        {
            return Ok(());
        }
        survives(4 << 20, || drop(Assembler::new(expected)))
    });
}

#[test]
fn messages_may_say_anything() {
    let report = pb::ReportRequest {
        lease: Some(wire::lease_to_wire(
            &espalier_common::ids::RunId("r".to_owned()),
            espalier_common::ids::Lease {
                unit: espalier_common::ids::Unit::Prune(espalier_common::ids::LayerIndex(1)),
                worker: espalier_common::ids::WorkerId(1),
                attempt: espalier_common::ids::Attempt(1),
            },
        )),
        outcome: Some(pb::report_request::Outcome::Evaluated(pb::Evaluated {
            window_nll: vec![1.0; 8],
            phases: vec![],
        })),
        held: vec![1, 2, 3],
        ..Default::default()
    };
    check(3000, foreign(report.encode_to_vec()), |bytes| {
        survives(bytes.len(), || {
            let Ok(message) = pb::ReportRequest::decode(&bytes[..]) else { return };
            let _ = message.lease.map(wire::lease_from_wire);
            let _ = message.outcome.map(wire::outcome_from_wire);
        })
    });
    check(2000, prop::collection::vec(any::<u8>(), 0..512), |bytes| {
        survives(bytes.len(), || pb::ModelOutline::decode(&bytes[..]).ok().map(ModelOutline::try_from)).map(drop)
    });
}

#[test]
fn tokens_of_a_run_may_be_anything() {
    let good = TokenBlock::new(4, (0..64).collect()).to_bytes();
    check(3000, foreign(good), |bytes| {
        survives(bytes.len(), || {
            let Ok(block) = TokenBlock::from_bytes(&bytes) else { return };
            (0..block.sequences()).for_each(|index| drop(block.sequence(index).to_vec()));
        })
    });
}

#[test]
fn files_that_people_write_may_say_anything() {
    let job = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config/job.toml")).unwrap();
    check(2000, foreign(job), |bytes| {
        let text = String::from_utf8_lossy(&bytes);
        survives(text.len(), || parse_document::<JobSpec>("job.toml", &text).ok().map(|job| job.validate().is_ok()))
            .map(drop)
    });
    let cluster = b"[[workers]]\nname = \"gpu\"\ncount = 4\nmemory = \"80GB\"\ngflops = 40000\n[network]\ngigabits_per_second = 25\n";
    check(2000, foreign(cluster.to_vec()), |bytes| {
        let text = String::from_utf8_lossy(&bytes);
        // Of more workers than 65 536, none is made.
        survives(text.len() + (1 << 20), || {
            parse_document::<ClusterSpec>("cluster.toml", &text).ok().map(|cluster| cluster.workers().is_ok())
        })
        .map(drop)
    });
    let folder = tempfile::tempdir().unwrap();
    for (name, good) in [
        (
            "worker.toml",
            "[worker]\nthreads = 8\nlisten = \"127.0.0.1:0\"\nmemory_budget = 8589934592\n[log]\nformat = \"json\"\n",
        ),
        (
            "worker.yaml",
            "worker:\n  threads: 8\n  listen: \"127.0.0.1:0\"\n  scratch: [a, {b: c}]\nlog: &x\n  format: json\n",
        ),
        ("worker.json", "{\"worker\":{\"threads\":8,\"listen\":\"127.0.0.1:0\"},\"log\":{\"format\":\"json\"}}"),
    ] {
        let path = folder.path().join(name);
        check(500, foreign(good.as_bytes().to_vec()), |bytes| {
            fs::write(&path, &bytes).unwrap();
            survives(bytes.len(), || load::<WorkerConfig>(Some(&path), ENV_PREFIX, Overrides::default())).map(drop)
        });
    }
}

#[test]
fn keys_certificates_and_tokens_may_be_anything() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    let good = "# people\nsubmitter 3f0c4a-submitters-token-for-a-test-0001 alice\nviewer sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 bob\n";
    write_secret(&tokens, good).unwrap();
    Tokens::open(tokens.clone()).expect("the good one is good");
    check(500, foreign(good.as_bytes().to_vec()), |bytes| {
        fs::write(&tokens, &bytes).unwrap();
        fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600)).unwrap();
        survives(bytes.len(), || Tokens::open(tokens.clone()).is_ok()).map(drop)
    });
    let tls = folder.path().join("tls");
    Authority::new("the authority").unwrap().equip(&tls, "worker", &["worker"]).unwrap();
    let section = TlsSection { folder: Some(tls.clone()), ..TlsSection::default() };
    section.open(None).expect("the good ones are good");
    for file in ["ca.crt", "tls.crt", "tls.key"] {
        let good = fs::read(tls.join(file)).unwrap();
        check(300, foreign(good.clone()), |bytes| {
            fs::write(tls.join(file), &bytes).unwrap();
            survives(bytes.len(), || section.open(None).is_ok()).map(drop)
        });
        fs::write(tls.join(file), good).unwrap();
    }
}

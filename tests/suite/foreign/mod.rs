//! Bytes from a disk, a wire or a user, whatever they are: every reader returns, none panics, and none asks for memory that the bytes
//! do not account for, or takes longer than a moment. Good input is damaged at random; a failure tells the input. Every reader is
//! tried a little by `make test`, and for as long as one likes by `make fuzz`: see [`TARGETS`].

mod damage;
mod effort;
mod watch;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use espalier_common::calibration::TokenBlock;
use espalier_common::checkpoint;
use espalier_common::config::{ENV_PREFIX, Overrides, load, parse_document};
use espalier_common::fault::{Fault, FaultClass};
use espalier_common::ids::{Attempt, LayerIndex, Lease, RunId, Unit, WorkerId};
use espalier_common::job::JobSpec;
use espalier_common::outline::ModelOutline;
use espalier_common::report::Outcome;
use espalier_common::wire;
use espalier_coordinator::journal::{self, EvaluatedModel, JournalRecord, WorkerTotals};
use espalier_coordinator::plan::cluster::ClusterSpec;
use espalier_coordinator::schedule::Record;
use espalier_gate::trace::Context;
use espalier_gate::{TlsSection, Tokens};
use espalier_proto::v1 as pb;
use espalier_worker::config::WorkerConfig;
use espalier_worker::transport::chunk::{Assembler, Expected};
use harness::authority::{Authority, write_secret};
use harness::{golden, tiny};
use proptest::prelude::*;
use prost::Message as _;
use tempfile::TempDir;

use self::damage::foreign;
pub(crate) use self::effort::Effort;
use self::watch::survives;
pub(crate) use self::watch::watch_for_hangs;

/// Files of the test's own.
const OWN: &str = "the test's own files can be written and read";

/// A reader's name, and what tries it: says with how many inputs.
pub(crate) type Target = (&'static str, fn(&Effort) -> u64);

/// Every reader of what comes from elsewhere.
pub(crate) const TARGETS: [Target; 11] = [
    ("safetensors header", safetensors_header),
    ("safetensors index and config", index_and_config),
    ("gguf", gguf),
    ("journal", journal),
    ("activation chunk", activation_chunk),
    ("messages", messages),
    ("token block", token_block),
    ("job file", job_file),
    ("configurations", configurations),
    ("keys, certificates and tokens", keys_certificates_and_tokens),
    ("traceparent", traceparent),
];

#[test]
fn a_safetensors_file_may_hold_anything() {
    safetensors_header(&Effort::Some);
}

#[test]
fn an_index_and_a_config_may_say_anything() {
    index_and_config(&Effort::Some);
}

#[test]
fn a_gguf_file_may_hold_anything() {
    gguf(&Effort::Some);
}

#[test]
fn a_journal_may_hold_anything() {
    journal(&Effort::Some);
}

#[test]
fn a_stream_of_hidden_states_may_bring_anything() {
    activation_chunk(&Effort::Some);
}

#[test]
fn messages_may_say_anything() {
    messages(&Effort::Some);
}

#[test]
fn tokens_of_a_run_may_be_anything() {
    token_block(&Effort::Some);
}

#[test]
fn files_that_people_write_may_say_anything() {
    job_file(&Effort::Some);
    configurations(&Effort::Some);
}

#[test]
fn keys_certificates_and_tokens_may_be_anything() {
    keys_certificates_and_tokens(&Effort::Some);
}

#[test]
fn what_a_call_says_of_its_trace_may_be_anything() {
    traceparent(&Effort::Some);
}

/// A folder for damaged files: in memory where that can be had, for a disk makes whoever replaces a file wait.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect(OWN)
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

/// The same of other kinds: an empty tensor, a scalar, holes that the format does not allow.
fn safetensors_of_other_shapes() -> Vec<u8> {
    let header = br#"{"a":{"dtype":"F16","shape":[0,8],"data_offsets":[0,0]},"b":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"c":{"dtype":"U8","shape":[3,1,2],"data_offsets":[4,10]}}      "#;
    [&(header.len() as u64).to_le_bytes()[..], header].concat()
}

fn safetensors_header(effort: &Effort) -> u64 {
    let folder = scratch();
    fs::copy(tiny("llama-tiny").join("config.json"), folder.path().join("config.json")).expect(OWN);
    let (front, data) = safetensors();
    let whole = [front.clone(), data.clone()].concat();
    fs::write(folder.path().join("model.safetensors"), &whole).expect(OWN);
    assert_eq!(read_all(folder.path()), 2, "the good one is good");
    effort.check(2000, foreign(vec![front, safetensors_of_other_shapes()]), |front| {
        let bytes = [front, data.clone()].concat();
        fs::write(folder.path().join("model.safetensors"), &bytes).expect(OWN);
        survives(bytes.len(), || read_all(folder.path())).map(drop)
    })
}

fn index_and_config(effort: &Effort) -> u64 {
    let folder = scratch();
    let (front, data) = safetensors();
    fs::write(folder.path().join("model-00001-of-00001.safetensors"), [front, data].concat()).expect(OWN);
    let good = br#"{"metadata":{"total_size":160},"weight_map":{"a.weight":"model-00001-of-00001.safetensors","b.bias":"model-00001-of-00001.safetensors"}}"#;
    let config = fs::read(tiny("llama-tiny").join("config.json")).expect(OWN);
    fs::write(folder.path().join("config.json"), &config).expect(OWN);
    fs::write(folder.path().join("model.safetensors.index.json"), good).expect(OWN);
    assert_eq!(read_all(folder.path()), 2, "the good one is good");
    effort.check(1000, (foreign(vec![good.to_vec()]), foreign(vec![config])), |(index, config)| {
        fs::write(folder.path().join("model.safetensors.index.json"), &index).expect(OWN);
        fs::write(folder.path().join("config.json"), &config).expect(OWN);
        survives(index.len() + config.len() + 512, || read_all(folder.path())).map(drop)
    })
}

fn gguf(effort: &Effort) -> u64 {
    let folder = scratch();
    let path = folder.path().join("model.gguf");
    let good = fs::read(golden().join("gguf/llama.gguf")).expect(OWN);
    fs::write(&path, &good).expect(OWN);
    assert!(read_all(&path) > 10, "the good one is good");
    // Damage to weights is no damage to the file: most of it goes to the front.
    let front = good.len() / 20;
    let (head, tail) = (good[..front].to_vec(), good[front..].to_vec());
    effort.check(300, foreign(vec![head]), |head| {
        let bytes = [head, tail.clone()].concat();
        fs::write(&path, &bytes).expect(OWN);
        survives(bytes.len(), || read_all(&path)).map(drop)
    })
}

/// One record of most kinds, as a journal has them.
fn journal_records() -> Vec<Vec<u8>> {
    let created = r#"{"created":{"run":"r","job":{"model":{"source":"m"},"calibration":{"source":"c"},"output":{"uri":"o"}},"tokens":{"name":"t","sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","bytes":0},"model_fingerprint":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","created":0}}"#;
    let lease = Lease { unit: Unit::Prune(LayerIndex(1)), worker: WorkerId(1), attempt: Attempt(1) };
    let nll = Outcome::Evaluated { window_nll: vec![1.5; 4], phases: Vec::new() };
    let records = [
        JournalRecord::Prune(Record::Leased { lease }),
        JournalRecord::Prune(Record::Failed {
            lease,
            fault: Fault { class: FaultClass::Bug, message: "é".to_owned() },
        }),
        JournalRecord::Survey(Record::Committed { lease, outcome: Outcome::Forwarded { phases: Vec::new() } }),
        JournalRecord::Evaluate { model: EvaluatedModel::Pruned, record: Record::Committed { lease, outcome: nll } },
        JournalRecord::Shared { model: EvaluatedModel::Dense, shares: 3 },
        JournalRecord::Workers(WorkerTotals::default()),
        JournalRecord::Stopped {
            reason: "interrupted".to_owned(),
            seconds: 1.5,
            exit_code: Some(75),
            journal_seconds: 0.25,
        },
        JournalRecord::Finished { seconds: 2.5, journal_seconds: 0.5 },
    ];
    let json = |record| serde_json::to_vec(record).expect("a record is plain data");
    [created.as_bytes().to_vec()].into_iter().chain(records.iter().map(json)).collect()
}

fn journal(effort: &Effort) -> u64 {
    let folder = scratch();
    let path = folder.path().join("journal");
    let records = journal_records();
    let line = |json: &[u8]| [format!("{:08x} ", crc32fast::hash(json)).as_bytes(), json, b"\n"].concat();
    let lines: Vec<Vec<u8>> = records.iter().map(|record| line(record)).collect();
    fs::write(&path, lines.concat()).expect(OWN);
    assert_eq!(journal::read(&path).expect("it is good").len(), records.len(), "the good one is good");
    // A checksum that is right guards nothing against whoever can count.
    effort.check(2000, (foreign(records), foreign(lines.clone())), |(json, raw)| {
        let bytes = [&lines[0][..], &line(&json), &raw].concat();
        fs::write(&path, &bytes).expect(OWN);
        survives(bytes.len(), || journal::read(&path)).map(drop)
    })
}

fn activation_chunk(effort: &Effort) -> u64 {
    let expected = Expected { streams: 2, sequences: 2, tokens: 4, hidden: 8 };
    let good = |stream, sequence| {
        let data = vec![3; 128];
        let crc32 = crc32fast::hash(&data);
        pb::Chunk { stream, sequence, offset: 0, data: data.into(), crc32, tokens: 4, hidden: 8 }
    };
    let mut assembler = Assembler::new(expected).expect(OWN);
    assert!(assembler.push(&good(0, 0)).expect(OWN).is_some(), "the good one is good");
    let first = good(0, 0).encode_to_vec();
    let corpus = vec![first, good(1, 1).encode_to_vec()];
    let tried = effort.split(2).check(3000, prop::collection::vec(foreign(corpus), 1..6), |messages| {
        let bytes = messages.iter().map(Vec::len).sum();
        survives(bytes, || {
            let mut assembler = Assembler::new(expected).expect(OWN);
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
    tried
        + effort.split(2).check(500, sizes, |(streams, sequences, tokens, hidden)| {
            let expected = Expected { streams, sequences, tokens, hidden };
            // Whoever wants more than this has been refused before: see what a worker expects of a job's own sizes.
            if expected.tokens.saturating_mul(expected.hidden) > 1 << 20
                && tokens.checked_mul(hidden).is_some_and(|n| n.checked_mul(4).is_some())
            {
                return Ok(());
            }
            survives(4 << 20, || drop(Assembler::new(expected)))
        })
}

fn messages(effort: &Effort) -> u64 {
    let report = pb::ReportRequest {
        lease: Some(wire::lease_to_wire(
            &RunId("r".to_owned()),
            Lease { unit: Unit::Prune(LayerIndex(1)), worker: WorkerId(1), attempt: Attempt(1) },
        )),
        outcome: Some(pb::report_request::Outcome::Evaluated(pb::Evaluated {
            window_nll: vec![1.0; 8],
            phases: vec![],
        })),
        held: vec![1, 2, 3],
        ..Default::default()
    };
    let tried = effort.split(2).check(3000, foreign(vec![report.encode_to_vec()]), |bytes| {
        survives(bytes.len(), || {
            let Ok(message) = pb::ReportRequest::decode(&bytes[..]) else { return };
            let _ = message.lease.map(wire::lease_from_wire);
            let _ = message.outcome.map(wire::outcome_from_wire);
        })
    });
    tried
        + effort.split(2).check(2000, prop::collection::vec(any::<u8>(), 0..512), |bytes| {
            survives(bytes.len(), || pb::ModelOutline::decode(&bytes[..]).ok().map(ModelOutline::try_from)).map(drop)
        })
}

fn token_block(effort: &Effort) -> u64 {
    let good = TokenBlock::new(4, (0..64).collect()).to_bytes();
    effort.check(3000, foreign(vec![good]), |bytes| {
        survives(bytes.len(), || {
            let Ok(block) = TokenBlock::from_bytes(&bytes) else { return };
            (0..block.sequences()).for_each(|index| drop(block.sequence(index).to_vec()));
        })
    })
}

fn job_file(effort: &Effort) -> u64 {
    let job = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config/job.toml")).expect(OWN);
    let other = b"model.source = 'hf://o/n'\n[calibration]\nsource = \"\"\"c\"\"\"\nsamples = 0x10\n[output]\nuri = \"s3://b/o\"\n[pattern]\nn = 2\nm = 4\n[method]\nname = \"alps\"\nparams = { a = [1, 2.5e3], b = 1979-05-27T07:32:00Z }\n";
    effort.check(2000, foreign(vec![job, other.to_vec()]), |bytes| {
        let text = String::from_utf8_lossy(&bytes);
        survives(text.len(), || parse_document::<JobSpec>("job.toml", &text).ok().map(|job| job.validate().is_ok()))
            .map(drop)
    })
}

fn configurations(effort: &Effort) -> u64 {
    let effort = effort.split(4);
    let cluster = b"[[workers]]\nname = \"gpu\"\ncount = 4\nmemory = \"80GB\"\ngflops = 40000\n[network]\ngigabits_per_second = 25\n";
    let mut tried = effort.check(2000, foreign(vec![cluster.to_vec()]), |bytes| {
        let text = String::from_utf8_lossy(&bytes);
        // Of more workers than 65 536, none is made.
        survives(text.len() + (1 << 20), || {
            parse_document::<ClusterSpec>("cluster.toml", &text).ok().map(|cluster| cluster.workers().is_ok())
        })
        .map(drop)
    });
    let folder = scratch();
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
        tried += effort.check(500, foreign(vec![good.as_bytes().to_vec()]), |bytes| {
            fs::write(&path, &bytes).expect(OWN);
            survives(bytes.len(), || load::<WorkerConfig>(Some(&path), ENV_PREFIX, Overrides::default())).map(drop)
        });
    }
    tried
}

fn keys_certificates_and_tokens(effort: &Effort) -> u64 {
    let effort = effort.split(4);
    let folder = scratch();
    let tokens = folder.path().join("tokens");
    let good = "# people\nsubmitter 3f0c4a-submitters-token-for-a-test-0001 alice\nviewer sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 bob\n";
    write_secret(&tokens, good).expect(OWN);
    Tokens::open(tokens.clone()).expect("the good one is good");
    let mut tried = effort.check(500, foreign(vec![good.as_bytes().to_vec()]), |bytes| {
        fs::write(&tokens, &bytes).expect(OWN);
        fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600)).expect(OWN);
        survives(bytes.len(), || Tokens::open(tokens.clone()).is_ok()).map(drop)
    });
    let tls = folder.path().join("tls");
    Authority::new("the authority").expect(OWN).equip(&tls, "worker", &["worker"]).expect(OWN);
    let section = TlsSection { folder: Some(tls.clone()), ..TlsSection::default() };
    section.open(None).expect("the good ones are good");
    for file in ["ca.crt", "tls.crt", "tls.key"] {
        let good = fs::read(tls.join(file)).expect(OWN);
        tried += effort.check(300, foreign(vec![good.clone()]), |bytes| {
            fs::write(tls.join(file), &bytes).expect(OWN);
            survives(bytes.len(), || section.open(None).is_ok()).map(drop)
        });
        fs::write(tls.join(file), good).expect(OWN);
    }
    tried
}

fn traceparent(effort: &Effort) -> u64 {
    let good = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_vec();
    let other = b"cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-comes".to_vec();
    effort.check(3000, foreign(vec![good, other]), |bytes| {
        let header = String::from_utf8_lossy(&bytes);
        let read = survives(bytes.len(), || Context::parse(&header))?;
        // What is taken for one can be said again.
        prop_assert!(read.is_none_or(|context| Context::parse(&context.traceparent()) == Some(context)));
        Ok(())
    })
}

//! Tests of the writer; the `safetensors` crate is the judge of what it wrote.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;
use crate::digest::Digest;
use crate::fault::FaultClass;

fn header(dtype: Dtype, shape: &[usize]) -> TensorHeader {
    TensorHeader { dtype, shape: shape.to_vec() }
}

fn contents(name: &str, header: &TensorHeader) -> Vec<u8> {
    (0..header.bytes()).map(|byte| (byte * 31 + name.len() * 7) as u8).collect()
}

fn entries(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn write_all(target: &Path, shard_bytes: u64, plan: Vec<(String, TensorHeader)>) -> Vec<WrittenFile> {
    let mut writer = CheckpointWriter::create(target, shard_bytes, plan).unwrap();
    let order: Vec<_> = writer.order().map(|(name, header)| (name.to_owned(), contents(name, header))).collect();
    for (name, bytes) in order {
        writer.write(&name, &bytes).unwrap();
    }
    writer.add_file("config.json", b"{}").unwrap();
    writer.finish().unwrap()
}

#[test]
fn one_shard_has_no_index_and_files_carry_their_hashes() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("new/out");
    let plan = vec![("b".to_owned(), header(Dtype::Bf16, &[2, 3])), ("a".to_owned(), header(Dtype::Bf16, &[1]))];
    let mut writer = CheckpointWriter::create(&target, 1000, plan).unwrap();
    writer.write("b", &[1; 12]).unwrap();
    writer.write("a", &[2; 2]).unwrap();
    let hashes = writer.close_tensors().unwrap().to_vec();
    assert_eq!(hashes.len(), 1);
    writer.add_file("espalier.json", hashes[0].sha256.to_string().as_bytes()).unwrap();
    assert!(!target.exists(), "nothing is visible before the end");
    let written = writer.finish().unwrap();
    assert_eq!(entries(&target), ["espalier.json", "model.safetensors"]);
    assert_eq!(entries(target.parent().unwrap()), ["out"]);
    for file in &written {
        let bytes = fs::read(target.join(&file.name)).unwrap();
        assert_eq!((file.sha256, file.bytes), (Digest::of(&bytes), bytes.len() as u64));
    }
    let bytes = fs::read(target.join("model.safetensors")).unwrap();
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let mode = fs::metadata(&target).unwrap().permissions().mode();
    assert_ne!(mode & 0o050, 0, "others may read it, as far as the umask lets them");
}

#[test]
fn shards_fill_greedily_in_the_given_order() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let sizes = [("d", 3), ("c", 2), ("large", 9), ("b", 1), ("a", 4)];
    let plan = sizes.map(|(name, size)| (name.to_owned(), header(Dtype::F16, &[size]))).to_vec();
    write_all(&target, 10, plan);
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(target.join("model.safetensors.index.json")).unwrap()).unwrap();
    let shard = |number| format!("model-{number:05}-of-00003.safetensors");
    let expected = serde_json::json!({
        "metadata": { "total_parameters": 19, "total_size": 38 },
        "weight_map": { "a": shard(3), "b": shard(3), "c": shard(1), "d": shard(1), "large": shard(2) },
    });
    assert_eq!(index, expected);
}

#[test]
fn four_byte_tensors_are_never_misaligned() {
    let directory = tempfile::tempdir().unwrap();
    let plan = vec![("odd".to_owned(), header(Dtype::Bf16, &[3])), ("wide".to_owned(), header(Dtype::F32, &[2]))];
    let writer = CheckpointWriter::create(&directory.path().join("out"), 1000, plan).unwrap();
    assert_eq!(writer.order().map(|(name, _)| name).collect::<Vec<_>>(), ["wide", "odd"]);
}

#[test]
fn unfinished_checkpoint_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let plan = || vec![("a".to_owned(), header(Dtype::F16, &[1])), ("b".to_owned(), header(Dtype::F16, &[1]))];
    let mut writer = CheckpointWriter::create(&target, 1000, plan()).unwrap();
    assert_eq!(entries(directory.path()).len(), 1);
    assert!(matches!(writer.write("b", &[0; 2]), Err(CheckpointError::OutOfTurn { .. })));
    assert!(matches!(writer.write("a", &[0; 3]), Err(CheckpointError::ByteLength { .. })));
    writer.write("a", &[0; 2]).unwrap();
    for name in ["../x", "a/b", "", "model.safetensors", "model.safetensors.index.json", ".."] {
        assert!(matches!(writer.add_file(name, b""), Err(CheckpointError::BadFileName { .. })), "{name}");
    }
    assert!(matches!(writer.finish(), Err(CheckpointError::OutOfTurn { .. })));
    assert!(entries(directory.path()).is_empty());
    let doubled = [plan(), plan()].concat();
    assert!(matches!(
        CheckpointWriter::create(&target, 1000, doubled),
        Err(CheckpointError::InvalidTensor { problem: "is planned twice", .. })
    ));
    assert!(entries(directory.path()).is_empty());
}

#[test]
fn taken_outputs_are_refused_before_any_work() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("empty")).unwrap();
    fs::create_dir(at("full")).unwrap();
    fs::write(at("full/x"), b"").unwrap();
    fs::write(at("file"), b"").unwrap();
    for name in ["empty", "new", "new/deep"] {
        check_target(&at(name)).unwrap();
        assert!(!at("new").exists(), "checking creates nothing");
    }
    for name in ["full", "file"] {
        let error = check_target(&at(name)).unwrap_err();
        assert!(matches!(error, CheckpointError::OutputExists { .. }), "{name}: {error}");
        assert_eq!(error.class(), FaultClass::Reject);
    }
    assert!(check_target(&at("file/below")).is_err());
    assert!(check_target(Path::new("/")).is_err());
    assert!(check_target(Path::new("/proc/nothing/here")).is_err());
    write_all(&at("empty"), 10, vec![]);
    assert_eq!(entries(&at("empty")), ["config.json", "model.safetensors"]);
}

#[test]
fn output_taken_while_writing_is_not_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let writer = CheckpointWriter::create(&target, 10, vec![]).unwrap();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("theirs"), b"").unwrap();
    assert!(matches!(writer.finish(), Err(CheckpointError::OutputExists { .. })));
    assert_eq!(entries(directory.path()), ["out"]);
    assert_eq!(entries(&target), ["theirs"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn what_is_written_is_read_back(
        tensors in prop::collection::vec((0usize..3, prop::collection::vec(0usize..5, 0..3)), 0..9),
        shard_bytes in 0u64..60,
    ) {
        let plan: Vec<_> = tensors
            .iter()
            .enumerate()
            .map(|(number, (dtype, shape))| {
                (format!("tensor.\"{number}\""), header([Dtype::F32, Dtype::F16, Dtype::Bf16][*dtype], shape))
            })
            .collect();
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let written = write_all(&target, shard_bytes, plan.clone());
        let checkpoint = open(&target).unwrap();
        prop_assert_eq!(checkpoint.names().len(), plan.len());
        for (name, header) in &plan {
            prop_assert_eq!(checkpoint.header(name), Some(header));
            prop_assert_eq!(checkpoint.read(name).unwrap(), contents(name, header));
        }
        let mut judged = 0;
        for file in written.iter().filter(|file| file.name.ends_with(".safetensors")) {
            let bytes = fs::read(target.join(&file.name)).unwrap();
            let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for (name, view) in parsed.tensors() {
                let (_, header) = plan.iter().find(|(planned, _)| *planned == name).unwrap();
                prop_assert_eq!(view.shape(), header.shape.as_slice());
                prop_assert_eq!(view.data(), contents(&name, header));
                judged += 1;
            }
        }
        prop_assert_eq!(judged, plan.len());
    }
}

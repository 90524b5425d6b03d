//! A coordinator that is given one job, as a batch job of a cluster is: it ends with the job's exit code, goes on with what it finds
//! when it is started again, and its workers end well once there is nothing left to do.

use std::fs;
use std::path::Path;

use anyhow::Result;
use harness::checkpoint::same_files;
use harness::process::{PATIENCE, Running, Workplace};
use harness::{golden, tiny};

use crate::past::{commits, outstanding};

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

/// A job file in the workplace, whose calibration text is cut to so many bytes.
fn write_job(workplace: &Workplace, text_bytes: usize) {
    let text = fs::read(golden().join("text/wikitext2-valid-head.txt"))
        .expect("a folder of our own takes what we write, and programs start");
    fs::write(workplace.path().join("text.txt"), &text[..text_bytes.min(text.len())])
        .expect("a folder of our own takes what we write, and programs start");
    let (model, folder) = (tiny("llama-tiny"), workplace.path());
    let job = format!(
        "[model]\nsource = \"{}\"\n[calibration]\nsource = \"{}\"\nsamples = 32\nsequence_length = 128\n[output]\nuri = \"{}\"\n",
        utf8(&model),
        utf8(&folder.join("text.txt")),
        utf8(&folder.join("out")),
    );
    fs::write(folder.join("job.toml"), job).expect("a folder of our own takes what we write, and programs start");
}

fn coordinator(workplace: &Workplace, listen: &str, workers: &str) -> Result<(Running, String)> {
    let arguments = ["coordinator", "--listen", listen, "--workers", workers, "--job", "job.toml", "--run", "run"];
    let mut coordinator = workplace.start(arguments)?;
    let url = coordinator.wait_for_line("listening on ")?;
    Ok((coordinator, url))
}

fn worker(workplace: &Workplace, url: &str) -> Running {
    workplace
        .start_program("espalier-worker", ["serve", "--coordinator", url, "--threads", "1"])
        .expect("a folder of our own takes what we write, and programs start")
}

fn reference() -> Workplace {
    let workplace = Workplace::new();
    write_job(&workplace, usize::MAX);
    workplace
        .run(["prune", "--job", "job.toml", "--run", "run"])
        .expect("a folder of our own takes what we write, and programs start")
        .success()
        .expect("a folder of our own takes what we write, and programs start");
    workplace
}

#[test]
fn it_ends_with_its_job_and_its_workers_end_with_it() {
    let reference = reference();
    let workplace = Workplace::new();
    write_job(&workplace, usize::MAX);
    let (coordinator, url) = coordinator(&workplace, "127.0.0.1:0", "2").unwrap();
    let workers = [worker(&workplace, &url), worker(&workplace, &url)];
    let finished = coordinator.finish(PATIENCE).unwrap().success().unwrap();
    assert!(finished.stdout.contains("checkpoint: "), "no report: {}", finished.stdout);
    for worker in workers {
        let ended = worker.finish(PATIENCE).unwrap().success().unwrap();
        assert!(ended.stderr.contains("dismissed"), "{}", ended.stderr);
    }
    same_files(&reference.path().join("out"), &workplace.path().join("out")).unwrap();
}

#[test]
fn it_is_stopped_with_75_and_goes_on_where_it_was_with_the_same_workers() {
    let reference = reference();
    let workplace = Workplace::new();
    write_job(&workplace, usize::MAX);
    let run = workplace.path().join("run");
    let (mut coordinator, url) = coordinator(&workplace, "127.0.0.1:0", "2").unwrap();
    let workers = [worker(&workplace, &url), worker(&workplace, &url)];
    coordinator
        .wait_until("a commit and a lease", || (!commits(&run).is_empty()).then(|| outstanding(&run)).flatten())
        .unwrap();
    coordinator.interrupt().unwrap();
    let stopped = coordinator.finish(PATIENCE).unwrap();
    assert_eq!(stopped.code(), Some(75), "{}", stopped.stderr);
    let before = commits(&run);
    let address = url.trim_start_matches("http://");
    let (again, _) = crate::one_job::coordinator(&workplace, address, "2").unwrap();
    again.finish(PATIENCE).unwrap().success().unwrap();
    assert!(commits(&run).starts_with(&before), "commits were lost");
    for worker in workers {
        worker.finish(PATIENCE).unwrap().success().unwrap();
    }
    same_files(&reference.path().join("out"), &workplace.path().join("out")).unwrap();

    // Done is done: once more finds it so, and computes nothing.
    let (once_more, url) = crate::one_job::coordinator(&workplace, "127.0.0.1:0", "1").unwrap();
    let worker = worker(&workplace, &url);
    once_more.finish(PATIENCE).unwrap().success().unwrap();
    worker.finish(PATIENCE).unwrap().success().unwrap();
}

#[test]
fn a_job_that_cannot_be_done_ends_with_65_and_keeps_no_worker() {
    let workplace = Workplace::new();
    write_job(&workplace, 1000);
    let (coordinator, url) = coordinator(&workplace, "127.0.0.1:0", "1").unwrap();
    let finished = coordinator.finish(PATIENCE).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    let lines = finished.error_lines();
    assert!(lines.len() == 1 && lines[0].contains("tokens, but"), "{lines:?}");
    drop(url);

    fs::write(workplace.path().join("job.toml"), "[model]\nsorce = \"m\"\n").unwrap();
    let wrong = workplace.run(["coordinator", "--listen", "127.0.0.1:0", "--job", "job.toml"]).unwrap();
    assert_eq!(wrong.code(), Some(65), "{}", wrong.stderr);
    let both = workplace.run(["coordinator", "--job", "job.toml", "--runs", "runs"]).unwrap();
    assert_eq!(both.code(), Some(2), "{}", both.stderr);
}

#[test]
fn it_tells_how_far_it_is_takes_no_other_job_and_is_not_tried_again_once_cancelled() {
    let workplace = Workplace::new();
    write_job(&workplace, usize::MAX);
    // It waits for a worker that does not come.
    let (coordinator, url) = coordinator(&workplace, "127.0.0.1:0", "2").unwrap();
    let worker = worker(&workplace, &url);
    let status = workplace.run(["status", "--json", "--coordinator", &url]).unwrap().success().unwrap();
    assert_eq!(status.json().unwrap()["runs"][0]["run"], "job-1", "{}", status.stdout);
    let other = ["prune", "--job", "job.toml", "--sparsity", "0.25", "--coordinator", &url];
    let refused = workplace.run(other).unwrap();
    assert_eq!(refused.code(), Some(65), "{}", refused.stderr);
    assert!(refused.error_lines()[0].contains("started for one job"), "{}", refused.stderr);
    workplace.run(["cancel", "job-1", "--coordinator", &url]).unwrap().success().unwrap();
    let ended = coordinator.finish(PATIENCE).unwrap();
    assert_eq!(ended.code(), Some(65), "{}", ended.stderr);
    assert_eq!(ended.error_lines(), ["error: cancelled"]);
    worker.finish(PATIENCE).unwrap().success().unwrap();
}

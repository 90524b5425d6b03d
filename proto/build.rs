//! Compiles the schema with protox, so that no system `protoc` is needed.

const FILES: [&str; 5] = [
    "espalier/v1/types.proto",
    "espalier/v1/coordinator.proto",
    "espalier/v1/worker.proto",
    "espalier/v1/activation.proto",
    "espalier/v1/assistance.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=espalier");
    let descriptors = protox::compile(FILES, ["."])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}

//! The wire schema of Espalier, generated from `espalier/v1/*.proto`. Conversions to domain types are in
//! `espalier_common::wire`.

/// Version 1 of the protocol.
pub mod v1 {
    #![allow(missing_docs, clippy::all, reason = "generated code; the .proto files hold the documentation")]
    tonic::include_proto!("espalier.v1");
}

//! What several workers do together, over a star of links: one worker in the middle, and one link to each of the others.
//!
//! A sum goes up the fixed tree of [`crate::calibrate::tree`], whoever has which of its leaves and whichever comes first; so its
//! bits depend on neither. Nothing is summed on the way: the links only carry, and every kind of link gives the same bits.

use std::ops::Range;

use bytes::Bytes;
use futures::future::try_join_all;

use super::link::{BodyError, Link};
use super::parcel::{bytes_of, numbers};
use crate::calibrate::gram::GramError;
use crate::calibrate::tree::{Branch, Forest, Portion, Sampling, Sums};

/// Where a worker is in a star.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// In the middle, with a link to each of the others.
    Middle(&'a [&'a dyn Link]),
    /// Outside, the number of others before it and its link to the middle.
    Outside(usize, &'a dyn Link),
}

/// Why something did not come about together.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// A link failed: which, by its number in the middle.
    #[error("link {link} of a star")]
    Link {
        /// Which.
        link: usize,
        /// How.
        #[source]
        source: BodyError,
    },
    /// What came cannot be summed.
    #[error(transparent)]
    Gram(#[from] GramError),
}

fn at(link: usize) -> impl Fn(BodyError) -> CollectiveError {
    move |source| CollectiveError::Link { link, source }
}

/// Brings a body of so many bytes from the middle to all; `body` is what the middle has.
///
/// # Errors
/// `Link`: the first that failed.
pub async fn broadcast(place: Place<'_>, body: Bytes, bytes: usize) -> Result<Bytes, CollectiveError> {
    match place {
        Place::Middle(links) => {
            let send = |(number, link)| {
                let (body, link): (_, &dyn Link) = (body.clone(), link);
                async move { link.send(body).await.map_err(at(number)) }
            };
            try_join_all(links.iter().copied().enumerate().map(send)).await?;
            Ok(body)
        }
        Place::Outside(number, link) => Ok(link.receive(bytes).await.map_err(at(number))?.into()),
    }
}

/// Sums up what all have, for all: `own` are the sums over this worker's leaves, and `leaves` are those of each, the middle's
/// first.
///
/// # Errors
/// `Link`: the first that failed; `Gram` if the leaves are not all there, or of different inputs.
pub async fn all_reduce(
    place: Place<'_>,
    sampling: &Sampling,
    leaves: &[Range<usize>],
    mut own: Forest,
) -> Result<Sums, CollectiveError> {
    let size = |branch: Branch| sampling.values(branch, Portion::All) * size_of::<f64>();
    let whole = Branch::of(&(0..crate::calibrate::tree::LEAVES))[0];
    let sum = match place {
        Place::Middle(links) => {
            let receive = |(number, link)| {
                let (link, branches): (&dyn Link, _) = (link, Branch::of(&leaves[number + 1]));
                async move {
                    let mut received = Vec::new();
                    for branch in branches {
                        let body = link.receive(size(branch)).await.map_err(at(number))?;
                        received.push((branch, body));
                    }
                    Ok::<_, CollectiveError>(received)
                }
            };
            let received = try_join_all(links.iter().copied().enumerate().map(receive)).await?;
            for (branch, body) in received.into_iter().flatten() {
                own.insert_values(sampling, (branch, Portion::All), &numbers::<f64>(&body))?;
            }
            let sum = own.into_sum()?;
            let body = bytes_of(sum.clone().into_values()?);
            broadcast(place, body, size(whole)).await?;
            sum
        }
        Place::Outside(number, link) => {
            for (_, sums) in own.into_branches() {
                let body = bytes_of(sums.into_values()?);
                link.send(body).await.map_err(at(number))?;
            }
            let body = broadcast(place, Bytes::new(), size(whole)).await?;
            Sums::from_values(sampling, (whole, Portion::All), &numbers::<f64>(&body))
        }
    };
    Ok(sum)
}

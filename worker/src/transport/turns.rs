//! Who sends when, over a link on which both sides must begin with the same body at the same time.
//!
//! A library that moves tensors between devices waits inside a transfer until the other side has begun with it too. So nobody
//! begins before the receiver is there, and the order in which the two directions take turns is decided by one side, the
//! leader: whatever it begins, it tells on an ordered stream, and the follower begins in the order in which it hears of it.

use super::link::BodyError;

/// What is said of a body before it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announced {
    /// Its size.
    pub bytes: u64,
    /// CRC-32 of it.
    pub crc32: u32,
}

/// What the two sides say to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// A body is ready to be sent.
    Announced(Announced),
    /// The follower is ready to receive what the leader announced.
    Clear,
    /// The leader begins: with its own body, or with receiving the follower's.
    Go {
        /// Whether the body is the leader's.
        own: bool,
    },
}

/// What a side must do, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Say it to the other side.
    Say(Turn),
    /// Begin to send the body that was announced.
    Send,
    /// Begin to receive; it must be what was announced.
    Receive(Announced),
}

/// One side, between transfers. What it begins, it need not wait for: transfers end in the order in which they begin.
#[derive(Debug)]
pub struct Turns {
    leads: bool,
    /// The body that this side announced.
    announced: Option<Announced>,
    /// The size of the body that this side waits for.
    wanted: Option<u64>,
    /// What the other side announced.
    offered: Option<Announced>,
    /// What the follower said it is ready for.
    cleared: Option<Announced>,
}

impl Turns {
    /// Before anything was said. Of two sides, one leads.
    pub fn new(leads: bool) -> Self {
        Self { leads, announced: None, wanted: None, offered: None, cleared: None }
    }

    /// This side has a body to send. The one before it must have begun.
    ///
    /// # Errors
    /// `OutOfTurn`.
    pub fn send(&mut self, body: Announced) -> Result<Vec<Act>, BodyError> {
        if self.announced.replace(body).is_some() {
            return Err(BodyError::OutOfTurn { what: "a second body to be sent" });
        }
        Ok(vec![Act::Say(Turn::Announced(body))])
    }

    /// This side is ready to receive a body of so many bytes. The one before it must have begun.
    ///
    /// # Errors
    /// `OutOfTurn`, `Size`.
    pub fn receive(&mut self, bytes: u64) -> Result<Vec<Act>, BodyError> {
        if self.cleared.is_some() || self.wanted.replace(bytes).is_some() {
            return Err(BodyError::OutOfTurn { what: "a second body to be received" });
        }
        self.meet()
    }

    /// The other side said something.
    ///
    /// # Errors
    /// `OutOfTurn`, `Size`.
    pub fn hear(&mut self, turn: Turn) -> Result<Vec<Act>, BodyError> {
        match turn {
            Turn::Announced(body) => {
                if self.offered.replace(body).is_some() {
                    return Err(BodyError::OutOfTurn { what: "a second announcement" });
                }
                self.meet()
            }
            Turn::Clear if self.leads && self.announced.take().is_some() => {
                Ok(vec![Act::Say(Turn::Go { own: true }), Act::Send])
            }
            Turn::Go { own: false } if !self.leads && self.announced.take().is_some() => Ok(vec![Act::Send]),
            Turn::Go { own: true } if !self.leads => {
                let body = self.cleared.take().ok_or(BodyError::OutOfTurn { what: "the leader's beginning" })?;
                Ok(vec![Act::Receive(body)])
            }
            Turn::Clear => Err(BodyError::OutOfTurn { what: "a clearance" }),
            Turn::Go { .. } => Err(BodyError::OutOfTurn { what: "a beginning" }),
        }
    }

    /// What is wanted and what is offered come together, once both are there.
    fn meet(&mut self) -> Result<Vec<Act>, BodyError> {
        let Some((wanted, offered)) = self.wanted.zip(self.offered) else { return Ok(Vec::new()) };
        if wanted != offered.bytes {
            return Err(BodyError::Size { found: offered.bytes, expected: wanted });
        }
        (self.wanted, self.offered) = (None, None);
        if self.leads {
            return Ok(vec![Act::Say(Turn::Go { own: false }), Act::Receive(offered)]);
        }
        self.cleared = Some(offered);
        Ok(vec![Act::Say(Turn::Clear)])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// A side with bodies to send and bodies to receive, what it has begun, and what is on its way to it.
    struct Side {
        turns: Turns,
        to_send: VecDeque<Announced>,
        to_receive: VecDeque<u64>,
        /// Whether it may send, or receive, the next one.
        idle: [bool; 2],
        begun: Vec<(bool, Announced)>,
        sending: Option<Announced>,
        mail: VecDeque<Turn>,
    }

    fn bodies(sizes: &[u64], seed: u32) -> VecDeque<Announced> {
        sizes.iter().zip(seed..).map(|(&bytes, crc32)| Announced { bytes, crc32 }).collect()
    }

    impl Side {
        fn new(leads: bool, out: &VecDeque<Announced>, into: &VecDeque<Announced>) -> Self {
            Self {
                turns: Turns::new(leads),
                to_send: out.clone(),
                to_receive: into.iter().map(|body| body.bytes).collect(),
                idle: [true, true],
                begun: Vec::new(),
                sending: None,
                mail: VecDeque::new(),
            }
        }

        /// Does one of three things, if it can; returns what it says.
        fn step(&mut self, what: u8) -> Option<Vec<Turn>> {
            let acts = match what {
                0 if self.idle[0] => {
                    let body = self.to_send.pop_front()?;
                    (self.idle[0], self.sending) = (false, Some(body));
                    self.turns.send(body)
                }
                1 if self.idle[1] => {
                    let bytes = self.to_receive.pop_front()?;
                    self.idle[1] = false;
                    self.turns.receive(bytes)
                }
                2 => self.turns.hear(self.mail.pop_front()?),
                _ => return None,
            };
            let mut said = Vec::new();
            for act in acts.unwrap() {
                match act {
                    Act::Say(turn) => said.push(turn),
                    Act::Send => {
                        self.begun.push((self.turns.leads, self.sending.take().unwrap()));
                        self.idle[0] = true;
                    }
                    Act::Receive(body) => {
                        self.begun.push((!self.turns.leads, body));
                        self.idle[1] = true;
                    }
                }
            }
            Some(said)
        }
    }

    proptest! {
        #[test]
        fn both_sides_begin_with_the_same_bodies_in_the_same_order(
            down in prop::collection::vec(1u64..9, 0..6),
            up in prop::collection::vec(1u64..9, 0..6),
            schedule in prop::collection::vec((0usize..2, 0u8..3), 0..80),
        ) {
            let (down, up) = (bodies(&down, 100), bodies(&up, 200));
            let mut sides = [Side::new(true, &down, &up), Side::new(false, &up, &down)];
            // After the schedule, whatever can still be done is: nobody may be left waiting.
            let rest = (0..200).flat_map(|_| (0..2).flat_map(|side| (0..3).map(move |what| (side, what))));
            for (side, what) in schedule.into_iter().chain(rest) {
                if let Some(said) = sides[side].step(what) {
                    sides[1 - side].mail.extend(said);
                }
            }
            prop_assert_eq!(&sides[0].begun, &sides[1].begun);
            prop_assert_eq!(sides[0].begun.len(), down.len() + up.len());
            let sent = |leaders: bool| sides[0].begun.iter().filter(move |(own, _)| *own == leaders).map(|(_, body)| *body);
            prop_assert!(sent(true).eq(down) && sent(false).eq(up));
        }
    }

    #[test]
    fn what_is_not_next_is_refused() {
        let body = Announced { bytes: 4, crc32: 7 };
        let out_of_turn = |result: Result<Vec<Act>, BodyError>| matches!(result, Err(BodyError::OutOfTurn { .. }));
        for leads in [true, false] {
            for turn in [Turn::Clear, Turn::Go { own: true }, Turn::Go { own: false }] {
                assert!(out_of_turn(Turns::new(leads).hear(turn)), "{leads} {turn:?}");
            }
            let mut turns = Turns::new(leads);
            turns.hear(Turn::Announced(body)).unwrap();
            assert!(out_of_turn(turns.hear(Turn::Announced(body))));
            let mut turns = Turns::new(leads);
            turns.hear(Turn::Announced(body)).unwrap();
            assert_eq!(turns.receive(5), Err(BodyError::Size { found: 4, expected: 5 }));
        }
        let mut leader = Turns::new(true);
        leader.send(body).unwrap();
        assert!(out_of_turn(leader.hear(Turn::Go { own: false })), "a follower does not decide");
    }
}

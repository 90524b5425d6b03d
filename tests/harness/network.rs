//! Machines of a test's own: network namespaces that a switch joins, which loses and delays packets as it is told to.
//!
//! Their addresses are loopback addresses (127.77.0.k), which each namespace routes to the switch instead of keeping to itself.
//! So programs that listen on loopback alone can be reached from another machine of the test, and from nowhere else: nothing
//! in the product is opened for it.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

use crate::compiled::compiled;

static NETWORKS: AtomicU32 = AtomicU32::new(0);

/// How bad the way to a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Way {
    /// Packets lost, of each thousand, in either direction.
    pub lost_of_thousand: u32,
    /// Milliseconds that a packet takes.
    pub delay_milliseconds: u32,
}

impl Way {
    /// Nothing comes through, and nobody is told.
    pub const CUT: Self = Self { lost_of_thousand: 1000, delay_milliseconds: 0 };
}

/// Packets so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Carried over.
    pub forwarded: u64,
    /// Lost on purpose.
    pub dropped: u64,
}

/// Some machines and the switch between them; all of it goes when this is dropped.
#[derive(Debug)]
pub struct Network {
    namespaces: Vec<String>,
    switch: Option<(Child, ChildStdin, BufReader<ChildStdout>)>,
}

impl Network {
    /// Says why this machine cannot have one: it takes root, `ip` of iproute2, and TUN devices.
    pub fn impediment() -> Option<String> {
        if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
            return Some(format!("/dev/net/tun: {error}"));
        }
        let name = format!("espalier-{}-probe-{}", std::process::id(), NETWORKS.fetch_add(1, Ordering::Relaxed));
        let made = ip(&["netns", "add", &name]);
        let gone = ip(&["netns", "delete", &name]);
        made.and(gone).err().map(|error| format!("{error:#}"))
    }

    /// Makes `machines` of them. Chance in the switch comes from `seed`.
    ///
    /// # Errors
    /// If the system does not let it.
    pub fn new(machines: usize, seed: u64) -> Result<Self> {
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let name = |machine| format!("espalier-{}-{number}-{machine}", std::process::id());
        let mut network = Self { namespaces: Vec::new(), switch: None };
        for machine in 0..machines {
            ip(&["netns", "add", &name(machine)])?;
            network.namespaces.push(name(machine));
        }
        let mut switch = Command::new(compiled("switch", include_str!("switch.c"), &[])?)
            .arg(seed.to_string())
            .args(&network.namespaces)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (input, output) = switch.stdin.take().zip(switch.stdout.take()).context("the switch has pipes")?;
        network.switch = Some((switch, input, BufReader::new(output)));
        // It answers once its devices are there.
        network.answer()?;
        for machine in 0..machines {
            network.address_machine(machine)?;
        }
        Ok(network)
    }

    fn address_machine(&self, machine: usize) -> Result<()> {
        let name = &self.namespaces[machine];
        let own = format!("{}/24", self.address(machine));
        // Only 127.0.0.1 itself stays at home.
        ip(&["-n", name, "address", "add", "127.0.0.1/32", "dev", "lo"])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        ip(&["-n", name, "address", "delete", "127.0.0.1/8", "dev", "lo"])?;
        for setting in ["all", "v0"] {
            let key = format!("net.ipv4.conf.{setting}.route_localnet=1");
            ip(&["netns", "exec", name, "sysctl", "-qw", &key])?;
        }
        ip(&["-n", name, "address", "add", &own, "dev", "v0"])?;
        ip(&["-n", name, "link", "set", "v0", "up"])
    }

    /// The address of a machine.
    pub fn address(&self, machine: usize) -> String {
        format!("127.77.0.{}", machine + 1)
    }

    /// What a command is preceded by to run on a machine.
    pub fn on(&self, machine: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.namespaces[machine]].map(str::to_owned).to_vec()
    }

    /// Makes the way to and from a machine as bad as this; tells what passed so far.
    ///
    /// # Errors
    /// If the switch is gone.
    pub fn set(&mut self, machine: usize, way: Way) -> Result<Traffic> {
        let (_, input, _) = self.switch.as_mut().context("the network has a switch")?;
        // In one write, so that the switch reads it in one.
        let line = format!("{} {} {}\n", machine + 1, way.lost_of_thousand, way.delay_milliseconds);
        input.write_all(line.as_bytes())?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Traffic> {
        let (_, _, output) = self.switch.as_mut().context("the network has a switch")?;
        let mut line = String::new();
        output.read_line(&mut line)?;
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        ensure!(line.starts_with("ok ") && numbers.len() == 2, "the switch says `{}`", line.trim_end());
        Ok(Traffic { forwarded: numbers[0], dropped: numbers[1] })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some((mut switch, input, _)) = self.switch.take() {
            drop(input);
            let _ = switch.wait();
        }
        for namespace in &self.namespaces {
            let _ = ip(&["netns", "delete", namespace]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("`ip` cannot be run")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), complaint.trim_end());
    Ok(())
}

//! A data plane that lives in memory: for tests of everything above it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Dataplane, OpError, Piece, PlaneError, Reader, Surroundings, WorkDone};
use crate::model::{HostPort, Protocol};
use crate::plan::{ObjectKey, Op, Standing};
use crate::policy::{Backend, Frontend, FrontendKey};

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    Address(IpAddr),
    Server(FrontendKey),
    Backend(FrontendKey, Backend),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl ObjectKey for Key {
    type Value = u32;

    fn create_phase(&self) -> u8 {
        match self {
            Self::Server(_) => 0,
            Self::Backend(..) => 1,
            Self::Address(_) => 2,
        }
    }

    fn delete_phase(&self) -> u8 {
        2 - self.create_phase()
    }

    fn retired(&self, _: &u32, standing: Standing) -> Option<u32> {
        match self {
            Self::Backend(frontend, _) if frontend.protocol == Protocol::Udp => {
                (standing == Standing::Serving).then_some(0)
            }
            Self::Backend(..) => Some(0),
            _ => None,
        }
    }

    fn leads_to(&self) -> Option<(FrontendKey, HostPort)> {
        match self {
            Self::Backend(frontend, backend) => {
                Some((*frontend, HostPort::new(backend.address, backend.port.get())))
            }
            _ => None,
        }
    }

    fn server_of(frontend: &FrontendKey) -> Option<Self> {
        Some(Self::Server(*frontend))
    }

    /// Not its address, so that there is something besides.
    fn usual(frontend: &FrontendKey) -> Vec<Self> {
        vec![Self::Server(*frontend)]
    }

    fn parent(&self) -> Option<Self> {
        match self {
            Self::Backend(frontend, _) => Some(Self::Server(*frontend)),
            _ => None,
        }
    }

    fn children(&self) -> Option<RangeInclusive<Self>> {
        const FIRST: Backend = Backend {
            address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            port: NonZeroU16::MIN,
            local: false,
            weight: 0,
        };
        const LAST: Backend = Backend {
            address: IpAddr::V6(Ipv6Addr::from_bits(u128::MAX)),
            port: NonZeroU16::MAX,
            local: true,
            weight: u16::MAX,
        };
        match self {
            Self::Server(frontend) => {
                Some(Self::Backend(*frontend, FIRST)..=Self::Backend(*frontend, LAST))
            }
            _ => None,
        }
    }
}

/// The pretended kernel; shared with the test that looks into it.
#[derive(Debug, Default)]
pub struct Kernel {
    pub objects: HashMap<Key, u32>,
    pub foreign: HashMap<Key, u32>,
    /// Every operation that arrived, in order.
    pub log: Vec<Op<Key>>,
    /// Operations that ever arrived; tests empty the log, a counter only grows.
    pub requests: u64,
    /// Operations to refuse: how many are let through first, then how many fail.
    pub refuse: Option<(usize, usize)>,
    /// Never carried out: what is answered.
    pub impossible: BTreeMap<Key, OpError>,
    /// Like `refuse`, but the operation takes effect and its answer is lost.
    pub lose_answer: Option<(usize, usize)>,
    pub readbacks: usize,
    /// Readbacks that fail, after their first piece.
    pub unreadable: usize,
    pub busy: BTreeSet<Key>,
    /// Foreign objects that an earlier proxy left.
    pub left: BTreeSet<Key>,
    /// How often they were asked for.
    pub takeovers: usize,
    /// How many the Node has, as last told: a part of every server's value.
    pub pod_cidrs: u32,
    /// What was found taken off, and put back, since somebody asked.
    pub put_back: u64,
}

#[derive(Debug, Clone, Default)]
pub struct Fake(pub Arc<Mutex<Kernel>>);

impl Fake {
    pub fn kernel(&self) -> std::sync::MutexGuard<'_, Kernel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn counts_down(window: &mut Option<(usize, usize)>) -> bool {
    match window {
        Some((skip, _)) if *skip > 0 => {
            *skip -= 1;
            false
        }
        Some((_, left)) if *left > 0 => {
            *left -= 1;
            true
        }
        _ => false,
    }
}

impl Kernel {
    fn apply(&mut self, op: &Op<Key>) -> Result<(), OpError> {
        self.log.push(op.clone());
        self.requests += 1;
        if let Some(error) = self.impossible.get(op.key()) {
            return Err(error.clone());
        }
        if counts_down(&mut self.refuse) {
            return Err(OpError::Refused("EINVAL".into()));
        }
        match op {
            Op::Create(key, value) | Op::Update(key, value) | Op::Retire(key, value) => {
                if key.parent().is_some_and(|parent| !self.objects.contains_key(&parent)) {
                    return Err(OpError::Refused("ESRCH".into()));
                }
                self.objects.insert(key.clone(), *value);
            }
            Op::Delete(key) => {
                self.objects.remove(key);
                self.foreign.remove(key);
            }
        }
        if counts_down(&mut self.lose_answer) {
            return Err(OpError::Unknown("ETIMEDOUT".into()));
        }
        Ok(())
    }
}

impl Dataplane for Fake {
    type Key = Key;

    fn lower(&mut self, key: &FrontendKey, frontend: &Frontend) -> Vec<(Key, u32)> {
        let timeout = frontend.affinity.map_or(1, |t| u32::try_from(t.as_secs()).unwrap_or(1));
        let value = timeout + 1000 * self.kernel().pod_cidrs;
        let mut objects = vec![(Key::Address(key.address), 1), (Key::Server(*key), value)];
        objects.extend(frontend.backends.iter().map(|b| (Key::Backend(*key, *b), 1)));
        objects
    }

    fn surroundings_changed(&mut self, now: Surroundings<'_>) -> bool {
        let count = now.node.map_or(0, |node| node.pod_cidrs.len());
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        std::mem::replace(&mut self.kernel().pod_cidrs, count) != count
    }

    fn prepare(&mut self) -> Result<(), PlaneError> {
        Ok(())
    }

    /// One object a piece.
    fn reader(&mut self) -> Result<Reader<Key>, PlaneError> {
        let mut kernel = self.kernel();
        kernel.readbacks += 1;
        let mut pieces: Vec<Piece<Key>> = Vec::new();
        for (key, value) in &kernel.objects {
            pieces.push(Piece { ours: vec![(key.clone(), *value)], foreign: Vec::new() });
        }
        for (key, value) in &kernel.foreign {
            pieces.push(Piece { ours: Vec::new(), foreign: vec![(key.clone(), *value)] });
        }
        let fails = kernel.unreadable > 0;
        kernel.unreadable = kernel.unreadable.saturating_sub(1);
        Ok(Box::new(move |give| {
            for piece in pieces {
                give(piece);
                if fails {
                    return Err(PlaneError::new("fake", "EIO"));
                }
            }
            Ok(())
        }))
    }

    fn apply(&mut self, ops: &[Op<Key>]) -> Vec<Result<(), OpError>> {
        let mut kernel = self.kernel();
        ops.iter().map(|op| kernel.apply(op)).collect()
    }

    fn unused(&mut self, retired: &[Key]) -> Result<Vec<Key>, PlaneError> {
        let kernel = self.kernel();
        Ok(retired.iter().filter(|key| !kernel.busy.contains(key)).cloned().collect())
    }

    fn take_put_back(&mut self) -> u64 {
        std::mem::take(&mut self.kernel().put_back)
    }

    fn superseded(&mut self, foreign: &HashMap<Key, u32>) -> Vec<Key> {
        let mut kernel = self.kernel();
        kernel.takeovers += 1;
        foreign.keys().filter(|key| kernel.left.contains(key)).cloned().collect()
    }

    fn work(&self) -> WorkDone {
        let requests = self.kernel().requests;
        WorkDone { requests, dumps: 0, sends: requests }
    }
}

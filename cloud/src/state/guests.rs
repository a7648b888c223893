//! State that the log carries for others, as bytes under a tag, without looking inside.

use std::any::Any;
use std::fmt::Debug;

use bytes::Bytes;
use shared::name::{Offset, TopicId};

use super::{Edges, Groups, Piece, Section, Slots, StateError, encode, piece};

/// All guests there are. Whoever comes adds a line.
fn guests() -> Vec<Box<dyn Guest>> {
    vec![Box::<Groups>::default(), Box::<Edges>::default(), Box::<Slots>::default()]
}

/// A change of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestChange {
    tag: u8,
    version: u8,
    bytes: Bytes,
}

impl GuestChange {
    pub(super) fn new(tag: u8, version: u8, bytes: Vec<u8>) -> Self {
        Self { tag, version, bytes: bytes.into() }
    }

    /// A change of this guest.
    pub(super) fn of<S: Section>(change: &S::Change) -> Self {
        let Piece { tag, version, bytes } = piece::<S, _>(change);
        Self::new(tag, version, bytes.into_owned())
    }

    pub(super) fn piece(&self) -> Piece<'_> {
        Piece { tag: self.tag, version: self.version, bytes: (&self.bytes[..]).into() }
    }

    /// What it says, if it is one of guest `S`.
    pub fn read<S: Section>(&self) -> Option<S::Change> {
        self.piece().value::<S, _>().ok()
    }
}

/// A [`Section`], as the log sees it.
trait Guest: Any + Debug + Send + Sync {
    fn tag(&self) -> u8;
    fn apply_bytes(&mut self, change: &Piece<'_>) -> Result<(), StateError>;
    fn deleted(&mut self, topic: TopicId);
    fn left_out(&mut self, skip: Offset);
    fn encoded(&self) -> Piece<'_>;
    fn decoded(&self, snapshot: &Piece<'_>) -> Result<Box<dyn Guest>, StateError>;
    fn copied(&self) -> Box<dyn Guest>;
    fn equals(&self, other: &dyn Any) -> bool;
    fn as_any(&self) -> &dyn Any;
}

impl<S: Section> Guest for S {
    fn tag(&self) -> u8 {
        S::TAG
    }

    fn apply_bytes(&mut self, change: &Piece<'_>) -> Result<(), StateError> {
        self.apply(change.value::<S, _>()?);
        Ok(())
    }

    fn deleted(&mut self, topic: TopicId) {
        self.topic_deleted(topic);
    }

    fn left_out(&mut self, skip: Offset) {
        self.offsets_left_out(skip);
    }

    fn encoded(&self) -> Piece<'_> {
        encode(self)
    }

    fn decoded(&self, snapshot: &Piece<'_>) -> Result<Box<dyn Guest>, StateError> {
        Ok(Box::new(snapshot.section::<S>()?))
    }

    fn copied(&self) -> Box<dyn Guest> {
        Box::new(self.clone())
    }

    fn equals(&self, other: &dyn Any) -> bool {
        other.downcast_ref::<S>().is_some_and(|other| self == other)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// All guests, in the order of [`guests`].
#[derive(Debug)]
pub struct Guests(Vec<Box<dyn Guest>>);

impl Default for Guests {
    fn default() -> Self {
        Self(guests())
    }
}

impl Clone for Guests {
    fn clone(&self) -> Self {
        Self(self.0.iter().map(|guest| guest.copied()).collect())
    }
}

impl PartialEq for Guests {
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(one, other)| one.equals(other.as_any()))
    }
}

impl Guests {
    fn of(&mut self, piece: &Piece<'_>) -> Result<&mut Box<dyn Guest>, StateError> {
        let unknown = StateError::Section { tag: piece.tag, version: piece.version };
        self.0.iter_mut().find(|guest| guest.tag() == piece.tag).ok_or(unknown)
    }

    pub fn apply(&mut self, change: &GuestChange) -> Result<(), StateError> {
        let piece = change.piece();
        self.of(&piece)?.apply_bytes(&piece)
    }

    pub fn topic_deleted(&mut self, id: TopicId) {
        self.0.iter_mut().for_each(|guest| guest.deleted(id));
    }

    pub fn offsets_left_out(&mut self, skip: Offset) {
        self.0.iter_mut().for_each(|guest| guest.left_out(skip));
    }

    pub fn encode(&self) -> impl Iterator<Item = Piece<'_>> {
        self.0.iter().map(|guest| guest.encoded())
    }

    pub fn decode(&mut self, snapshot: &Piece<'_>) -> Result<(), StateError> {
        let guest = self.of(snapshot)?;
        *guest = guest.decoded(snapshot)?;
        Ok(())
    }

    /// The guest of that type.
    pub fn get<S: Section>(&self) -> &S {
        let found = self.0.iter().find_map(|guest| guest.as_any().downcast_ref());
        found.expect("every guest that is read is in the list")
    }
}

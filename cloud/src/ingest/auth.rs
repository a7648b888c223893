//! Who an edge is: bearer tokens, each bound to one edge id and to the topics it may write.

use daemon::admin::bearer;
use shared::config::Secret;
use shared::name::{EdgeId, TopicName};

/// One gateway that may connect.
#[derive(Debug, Clone)]
pub struct EdgeGrant {
    /// The id the token belongs to.
    pub id: EdgeId,
    /// The token.
    pub token: Secret,
    /// Topics it may write; `None` = all.
    pub topics: Option<Vec<TopicName>>,
}

/// Who may connect. Without grants the link is open: each edge is who it says it is.
#[derive(Debug, Clone, Default)]
pub struct Grants(Vec<EdgeGrant>);

/// Why a request is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No token came.
    #[error("this link wants a token: set [uplink] token_file at the edge")]
    NoToken,
    /// A token came that belongs to nobody.
    #[error("the token is not known here: compare [uplink] token_file with [[link.edge]] token_file in the cloud")]
    UnknownToken,
    /// A token came that belongs to another id.
    #[error("the token belongs to edge \"{owner}\", the edge says it is \"{claimed}\"")]
    OtherEdge {
        /// Whose it is.
        owner: EdgeId,
        /// Who the sender says it is.
        claimed: EdgeId,
    },
}

/// A request whose token was good.
#[derive(Debug, Clone)]
pub struct Caller<'a>(Option<&'a EdgeGrant>);

impl Grants {
    /// These and no others; none = open.
    pub fn new(grants: Vec<EdgeGrant>) -> Self {
        Self(grants)
    }

    /// Whether anyone may connect under any id.
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks the value of an `Authorization` header.
    pub fn caller(&self, authorization: Option<&[u8]>) -> Result<Caller<'_>, AuthError> {
        if self.is_open() {
            return Ok(Caller(None));
        }
        let token = authorization.and_then(bearer).ok_or(AuthError::NoToken)?;
        let grant = self.0.iter().find(|grant| grant.token.matches(token));
        grant.map(|grant| Caller(Some(grant))).ok_or(AuthError::UnknownToken)
    }
}

impl Caller<'_> {
    /// Checks that the caller is the edge it says it is.
    pub fn is(&self, claimed: &EdgeId) -> Result<(), AuthError> {
        match self.0 {
            Some(grant) if grant.id != *claimed => {
                Err(AuthError::OtherEdge { owner: grant.id.clone(), claimed: claimed.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Why the caller may not write to a topic, if it may not.
    pub fn refuses(&self, topic: &TopicName) -> Option<String> {
        if topic.as_str().starts_with("__") || topic.as_str().starts_with("tributary.") {
            return Some(format!("topic \"{topic}\" is kept for the broker's own use: choose another name"));
        }
        let topics = self.0?.topics.as_ref()?;
        (!topics.contains(topic)).then(|| {
            format!(
                "topic \"{topic}\" is not allowed for this edge: add it to topics of its [[link.edge]] in the cloud"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grants() -> Grants {
        let grant = |id: &str, token: &str, topics: Option<&str>| EdgeGrant {
            id: EdgeId::parse(id).unwrap(),
            token: Secret::new(token.to_owned()),
            topics: topics.map(|topic| vec![TopicName::parse(topic).unwrap()]),
        };
        Grants::new(vec![grant("a", "secret-a", None), grant("b", "secret-b", Some("t"))])
    }

    #[test]
    fn a_token_belongs_to_one_edge() {
        let grants = grants();
        let (a, b) = (EdgeId::parse("a").unwrap(), EdgeId::parse("b").unwrap());
        let caller = grants.caller(Some(b"Bearer secret-a")).unwrap();
        assert_eq!(caller.is(&a), Ok(()));
        assert_eq!(caller.is(&b), Err(AuthError::OtherEdge { owner: a, claimed: b }));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let grants = grants();
        for (header, expected) in [
            (None, AuthError::NoToken),
            (Some(&b"secret-a"[..]), AuthError::NoToken),
            (Some(b"Basic secret-a"), AuthError::NoToken),
            (Some(b"Bearer "), AuthError::UnknownToken),
            (Some(b"Bearer secret-"), AuthError::UnknownToken),
            (Some(b"Bearer secret-aa"), AuthError::UnknownToken),
        ] {
            assert_eq!(grants.caller(header).unwrap_err(), expected, "{header:?}");
        }
        assert!(grants.caller(Some(b"bearer  secret-b ")).is_ok());
    }

    #[test]
    fn a_token_is_not_shown() {
        assert!(!format!("{:?}", grants()).contains("secret-a"));
    }

    #[test]
    fn topics_are_granted_by_name() {
        let grants = grants();
        let topic = |name: &str| TopicName::parse(name).unwrap();
        let b = grants.caller(Some(b"Bearer secret-b")).unwrap();
        assert_eq!(b.refuses(&topic("t")), None);
        assert!(b.refuses(&topic("u")).is_some());
        let a = grants.caller(Some(b"Bearer secret-a")).unwrap();
        assert_eq!(a.refuses(&topic("u")), None);
        for own in ["__consumer_offsets", "tributary.gaps"] {
            assert!(a.refuses(&topic(own)).is_some());
            assert!(Grants::default().caller(None).unwrap().refuses(&topic(own)).is_some());
        }
    }
}

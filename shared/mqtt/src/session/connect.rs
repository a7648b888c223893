//! CONNECT to CONNACK: the terms of a connection (MQTT 5 §3.1, §3.2).

use crate::codec::{ConnAck, Connect, Packet, Properties, QoS, Reason, Version};
use crate::front::{Settings, User};

/// What was agreed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    pub version: Version,
    pub client_id: String,
    /// Who connects; `None` where nobody is asked.
    pub user: Option<String>,
    /// The client sent none.
    pub client_id_assigned: bool,
    pub clean_start: bool,
    /// Seconds the session outlives its connection; `u32::MAX`: for ever.
    pub session_expiry_secs: u32,
    session_expiry_changed: bool,
    /// 0: none.
    pub keep_alive_secs: u16,
    keep_alive_changed: bool,
    /// PUBLISHes with QoS above 0 that may be on their way to the client.
    pub window: u16,
    /// Largest packet the client takes.
    pub packet_bytes_max: usize,
}

/// Decides on a CONNECT. `assign` makes a client identifier that nobody has.
pub(crate) fn negotiate(
    connect: &Connect<'_>,
    settings: &Settings,
    assign: impl FnOnce() -> String,
) -> Result<Terms, Reason> {
    let properties = &connect.properties;
    if properties.authentication_method.is_some() {
        return Err(Reason::BAD_AUTHENTICATION_METHOD);
    }
    if !is_known(connect, &settings.users) {
        return Err(Reason::BAD_USER_NAME_OR_PASSWORD);
    }
    if connect.client_id.len() > settings.client_id_bytes_max {
        return Err(Reason::CLIENT_IDENTIFIER_NOT_VALID);
    }
    let client_id_assigned = connect.client_id.is_empty();
    if client_id_assigned && connect.version == Version::V4 && !connect.clean_start {
        return Err(Reason::CLIENT_IDENTIFIER_NOT_VALID); // MQTT 3.1.1 §3.1.3.1
    }
    if connect.will.as_ref().is_some_and(|will| is_reserved(will.topic)) {
        return Err(Reason::TOPIC_NAME_INVALID);
    }
    let asked_expiry = match connect.version {
        Version::V5 => properties.session_expiry_secs.unwrap_or(0),
        Version::V4 if connect.clean_start => 0,
        Version::V4 => u32::MAX,
    };
    let session_expiry_secs = asked_expiry.min(settings.session_expiry_secs_max);
    let keep_alive_secs = match (connect.version, settings.keep_alive_secs_max) {
        (Version::V5, max) if max > 0 && (connect.keep_alive_secs == 0 || connect.keep_alive_secs > max) => max,
        _ => connect.keep_alive_secs,
    };
    Ok(Terms {
        version: connect.version,
        client_id: if client_id_assigned { assign() } else { connect.client_id.to_owned() },
        user: if settings.users.is_empty() { None } else { connect.username.map(str::to_owned) },
        client_id_assigned,
        clean_start: connect.clean_start,
        session_expiry_secs,
        session_expiry_changed: session_expiry_secs != asked_expiry,
        keep_alive_secs,
        keep_alive_changed: keep_alive_secs != connect.keep_alive_secs,
        window: properties.receive_maximum.unwrap_or(u16::MAX).min(settings.inflight_max).max(1),
        packet_bytes_max: properties.maximum_packet_size.map_or(usize::MAX, |max| max as usize),
    })
}

/// Whether name and password are those of a user; without users, everybody is known.
fn is_known(connect: &Connect<'_>, users: &[User]) -> bool {
    let (name, password) = (connect.username.unwrap_or_default(), connect.password.unwrap_or_default());
    users.is_empty() || users.iter().any(|user| user.name == name && user.password.matches(password))
}

/// Topics that only the broker publishes to.
pub(crate) fn is_reserved(topic: &str) -> bool {
    topic.starts_with("$SYS/")
}

/// Whose session a connection wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub client_id: String,
    pub user: Option<String>,
    /// It is to outlive the connection.
    pub kept: bool,
}

impl Terms {
    pub fn claim(&self) -> Claim {
        Claim { client_id: self.client_id.clone(), user: self.user.clone(), kept: self.session_expiry_secs > 0 }
    }

    /// Appends the CONNACK that accepts.
    pub fn accept(&self, session_present: bool, settings: &Settings, out: &mut Vec<u8>) {
        let properties = match self.version {
            Version::V4 => Properties::default(),
            Version::V5 => Properties {
                session_expiry_secs: self.session_expiry_changed.then_some(self.session_expiry_secs),
                receive_maximum: Some(settings.receive_maximum),
                maximum_packet_size: u32::try_from(settings.packet_bytes_max).ok(),
                assigned_client_id: self.client_id_assigned.then_some(&*self.client_id),
                topic_alias_maximum: (settings.topic_alias_max > 0).then_some(settings.topic_alias_max),
                server_keep_alive_secs: self.keep_alive_changed.then_some(self.keep_alive_secs),
                shared_subscription_available: Some(false),
                ..Properties::default()
            },
        };
        let ack = ConnAck { session_present, reason: Reason::SUCCESS, properties };
        let encoded = Packet::ConnAck(Box::new(ack)).encode(self.version, out);
        debug_assert_eq!(encoded, Ok(()), "every field is short");
    }
}

/// Appends the CONNACK that refuses.
pub(crate) fn refuse(reason: Reason, version: Version, out: &mut Vec<u8>) {
    let reason = match version {
        Version::V5 => reason,
        // MQTT 3.1.1 §3.2.2.3
        Version::V4 => Reason(match reason {
            Reason::UNSUPPORTED_PROTOCOL_VERSION => 1,
            Reason::CLIENT_IDENTIFIER_NOT_VALID => 2,
            Reason::BAD_USER_NAME_OR_PASSWORD => 4,
            Reason::NOT_AUTHORIZED | Reason::BAD_AUTHENTICATION_METHOD => 5,
            _ => 3,
        }),
    };
    let ack = ConnAck { session_present: false, reason, properties: Properties::default() };
    let encoded = Packet::ConnAck(Box::new(ack)).encode(version, out);
    debug_assert_eq!(encoded, Ok(()), "every field is short");
}

/// The lower of what a message has and what a subscription allows (§3.8.4).
pub(crate) fn granted(message: QoS, subscription: QoS) -> QoS {
    message.min(subscription)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(version: Version, client_id: &str) -> Connect<'_> {
        Connect {
            version,
            clean_start: true,
            keep_alive_secs: 60,
            client_id,
            will: None,
            username: None,
            password: None,
            properties: Properties::default(),
        }
    }

    #[test]
    fn terms_follow_the_standard() {
        let settings = Settings { keep_alive_secs_max: 30, session_expiry_secs_max: 100, ..Settings::default() };
        let terms = |c: &Connect<'_>| negotiate(c, &settings, || "assigned".into());

        let mut v5 = connect(Version::V5, "");
        v5.properties.session_expiry_secs = Some(1000);
        v5.properties.receive_maximum = Some(3);
        let agreed = terms(&v5).unwrap();
        assert_eq!((&*agreed.client_id, agreed.session_expiry_secs, agreed.keep_alive_secs), ("assigned", 100, 30));
        assert_eq!(agreed.window, 3);
        let mut out = Vec::new();
        agreed.accept(false, &settings, &mut out);
        let Ok(crate::codec::Split::Frame(frame)) = crate::codec::split(&out, Some(Version::V5), 1000) else {
            panic!()
        };
        let Ok(Packet::ConnAck(ack)) = Packet::decode(&frame, Version::V5) else { panic!() };
        assert_eq!(ack.properties.assigned_client_id, Some("assigned"));
        assert_eq!(ack.properties.server_keep_alive_secs, Some(30));
        assert_eq!(ack.properties.session_expiry_secs, Some(100));

        v5.properties.authentication_method = Some("SCRAM-SHA-256");
        assert_eq!(terms(&v5), Err(Reason::BAD_AUTHENTICATION_METHOD));

        let mut v4 = connect(Version::V4, "");
        assert_eq!(terms(&v4).unwrap().session_expiry_secs, 0);
        v4.clean_start = false;
        assert_eq!(terms(&v4), Err(Reason::CLIENT_IDENTIFIER_NOT_VALID));
        v4.client_id = "kept";
        assert_eq!(terms(&v4).unwrap().session_expiry_secs, 100);

        for (reason, code) in [(Reason::UNSUPPORTED_PROTOCOL_VERSION, 1), (Reason::QUOTA_EXCEEDED, 3)] {
            let mut out = Vec::new();
            refuse(reason, Version::V4, &mut out);
            assert_eq!(out, [0x20, 2, 0, code]);
        }
    }
}

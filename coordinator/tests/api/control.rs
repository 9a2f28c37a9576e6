//! Operators: pauses, aborts and resets, and who may ask for them.

use std::future::pending;

use phalanx_coordinator::api::{Api, EngineSlot, Listeners, StatusHandle, serve};
use phalanx_proto::{
    ErrorKind, RpcError,
    secret::ApiKeys,
    v1::{self, FinishReason, admin_client::AdminClient, control_client::ControlClient},
    vllm::{self, control_client::ControlClient as VllmControlClient},
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    ranks::Permit,
    server::{DEADLINE, Server, Setup, api, open, piece, request, rest},
};

async fn is_paused(server: &Server) -> bool {
    let mut admin = AdminClient::new(server.channel().await);
    let status = admin.get_status(v1::GetStatusRequest {}).await;
    status.expect("a reply").into_inner().paused
}

fn pause(mode: v1::PauseMode) -> v1::PauseRequest {
    v1::PauseRequest {
        mode: mode.into(),
        clear_cache: true,
    }
}

#[tokio::test]
async fn a_pause_lets_running_requests_end_and_holds_new_ones() {
    let mut server = Server::start(Setup::default());
    let mut control = ControlClient::new(server.channel().await);
    let mut inference = server.inference().await;
    let ask = |tokens| request(1, move |sampling| sampling.max_tokens = Some(tokens));
    let mut running = open(&mut inference, ask(3)).await;
    server.permit(Permit::Step);
    piece(&mut running).await;

    let pausing = tokio::spawn(async move {
        let reply = control.pause(pause(v1::PauseMode::Wait)).await;
        (control, reply.expect("a reply").into_inner().paused)
    });
    server.run_free();
    let (mut control, paused) = pausing.await.expect("no panic");
    assert!(paused && is_paused(&server).await);
    assert_eq!(rest(&mut running).await.0.finish_reason(), FinishReason::Length);

    let mut held = open(&mut inference, ask(2)).await;
    let reset = v1::ResetPrefixCacheRequest {
        reset_running_requests: true,
    };
    control
        .reset_prefix_cache(reset)
        .await
        .expect("also while paused");
    assert_eq!(server.engine.status().snapshot.num_waiting, 1, "it waits");
    control.resume(v1::ResumeRequest {}).await.expect("resumed");
    assert!(!is_paused(&server).await);
    assert_eq!(rest(&mut held).await.0.token_ids.len(), 2);
}

#[tokio::test]
async fn an_abort_ends_the_requests_it_names_or_all() {
    let server = Server::start(Setup::default());
    let mut control = ControlClient::new(server.channel().await);
    let mut inference = server.inference().await;
    let mut streams = Vec::new();
    for id in ["one", "two-0", "two-1", "three"] {
        let ask = v1::GenerateRequest {
            request_id: id.into(),
            ..request(1, |_| {})
        };
        streams.push(open(&mut inference, ask).await);
    }
    let mut abort = async |ids: &[&str]| {
        let request_ids = ids.iter().map(ToString::to_string).collect();
        let reply = control
            .abort_requests(v1::AbortRequestsRequest { request_ids })
            .await;
        reply.expect("a reply").into_inner().aborted
    };
    assert_eq!(abort(&["two", "nobody"]).await, 1, "both prompts of one request");
    // The first two may not have left the list yet.
    assert!((2..=4).contains(&abort(&[]).await));
    for stream in &mut streams {
        assert_eq!(rest(stream).await.0.finish_reason(), FinishReason::Abort);
    }
}

async fn keyed(admin_keys: &[&str]) -> (Channel, tokio::task::JoinHandle<()>) {
    let mut listeners = Listeners::default();
    let any = "127.0.0.1:0".parse().expect("an address");
    let address = listeners.bind_tcp(any).await.expect("binds");
    let keys = |keys: &[&str]| ApiKeys::new(keys.iter().map(ToString::to_string)).expect("keys");
    let keyed = Api {
        api_keys: keys(&["client"]),
        admin_keys: keys(admin_keys),
        ..api(EngineSlot::default(), StatusHandle::new())
    };
    let serving = tokio::spawn(async move {
        serve(keyed.routes(), listeners, pending(), DEADLINE)
            .await
            .expect("serves");
    });
    let tcp = Endpoint::from_shared(format!("http://{address}")).expect("an endpoint");
    (tcp.connect().await.expect("connects"), serving)
}

#[tokio::test]
async fn over_tcp_only_an_admin_key_admits() {
    for (configured, given, expected) in [
        // Past the door: there is no engine yet.
        (&["admin"][..], Some("admin"), ErrorKind::Unavailable),
        (&["admin"], Some("client"), ErrorKind::Unauthenticated),
        (&["admin"], None, ErrorKind::Unauthenticated),
        (&[], Some("admin"), ErrorKind::PermissionDenied),
        (&[], None, ErrorKind::PermissionDenied),
    ] {
        let (channel, serving) = keyed(configured).await;
        let mut control = ControlClient::with_interceptor(channel, |mut request: tonic::Request<()>| {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", "Bearer client".parse().expect("ascii"));
            if let Some(key) = given {
                metadata.insert("phalanx-admin-key", key.parse().expect("ascii"));
            }
            Ok(request)
        });
        let refused = control.resume(v1::ResumeRequest {}).await.expect_err("refused");
        assert_eq!(
            RpcError::from(&refused).kind,
            expected,
            "{configured:?} {given:?}"
        );
        serving.abort();
    }
}

#[tokio::test]
async fn vllms_control_pauses_as_ours_does() {
    let server = Server::free(Setup::default());
    let mut control = VllmControlClient::new(server.channel().await);
    let is_paused = async || {
        let reply = VllmControlClient::new(server.channel().await)
            .is_paused(vllm::IsPausedRequest {})
            .await;
        reply.expect("a reply").into_inner().paused
    };
    let wait = vllm::PauseGenerationRequest {
        mode: vllm::PauseMode::Wait.into(),
        clear_cache: None,
    };
    control.pause_generation(wait).await.expect("paused");
    assert!(is_paused().await && server.engine.status().snapshot.paused);
    let ask = request(1, |sampling| sampling.max_tokens = Some(2));
    let mut held = open(&mut server.inference().await, ask).await;
    control
        .resume_generation(vllm::ResumeGenerationRequest {})
        .await
        .expect("resumed");
    assert!(!is_paused().await);
    assert_eq!(rest(&mut held).await.0.token_ids.len(), 2);
}

#[tokio::test]
async fn over_tcp_vllms_control_tells_clients_and_operators_apart() {
    for (configured, given, told, changed) in [
        // Past the door: there is no engine yet.
        (&["admin"][..], Some("admin"), Ok(()), ErrorKind::Unavailable),
        (&["admin"], Some("client"), Ok(()), ErrorKind::Unauthenticated),
        (
            &["admin"],
            None,
            Err(ErrorKind::Unauthenticated),
            ErrorKind::Unauthenticated,
        ),
        (&[], Some("client"), Ok(()), ErrorKind::PermissionDenied),
    ] {
        let (channel, serving) = keyed(configured).await;
        let mut control = VllmControlClient::with_interceptor(channel, |mut request: tonic::Request<()>| {
            if let Some(key) = given {
                let bearer = format!("Bearer {key}").parse().expect("ascii");
                request.metadata_mut().insert("authorization", bearer);
            }
            Ok(request)
        });
        let kind = |status: &tonic::Status| RpcError::from(status).kind;
        let asked = control.is_paused(vllm::IsPausedRequest {}).await;
        assert_eq!(
            asked.map(drop).map_err(|status| kind(&status)),
            told,
            "{configured:?} {given:?}"
        );
        let resumed = control.resume_generation(vllm::ResumeGenerationRequest {}).await;
        assert_eq!(
            kind(&resumed.expect_err("no engine")),
            changed,
            "{configured:?} {given:?}"
        );
        let ended = control.shutdown(vllm::ShutdownRequest {}).await;
        assert_eq!(ended.is_ok(), given == Some("admin"), "{configured:?} {given:?}");
        serving.abort();
    }
}
